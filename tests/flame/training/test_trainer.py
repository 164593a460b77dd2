"""Training jobs on real gloo processes: resume, start, world sizes, LoRA, gradients."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.errors import UserError
from tests.distributed import run_distributed
from tests.flame.jobs import (
    TINY,
    largest_difference,
    losses_of,
    make_job,
    scalars_of,
    tensors_of,
    train_job,
)


def test_training_lowers_the_loss(two_ranks: Path) -> None:
    losses = losses_of(two_ranks)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.3


def test_tensorboard_has_a_curve_of_everything(two_ranks: Path) -> None:
    """Resident memory stands for the GPU's; without a teacher the loss is the cross entropy."""
    tags = (
        "loss/cross_entropy", "loss/kl", "loss/hidden", "lr", "grad_norm", "tokens_per_second",
        "memory/max_reserved(GiB)", "skipped_steps", "n_tokens_seen",
    )  # fmt: skip
    curves = {tag: scalars_of(two_ranks, tag) for tag in tags}
    assert all(sorted(curve) == [1, 2, 3, 4, 5, 6] for curve in curves.values())
    assert list(curves["loss/cross_entropy"].values()) == losses_of(two_ranks)
    for tag in ("grad_norm", "tokens_per_second", "memory/max_reserved(GiB)"):
        assert min(curves[tag].values()) > 0, tag
    for tag in ("loss/kl", "loss/hidden", "skipped_steps"):
        assert set(curves[tag].values()) == {0}, tag
    cosine = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    expected = [3e-3 * factor for factor in (0.5, 1.0, *cosine)]
    assert list(curves["lr"].values()) == pytest.approx(expected, rel=1e-6)
    assert curves["n_tokens_seen"][6] == 6 * 8 * 64


def test_run_folder_is_complete(two_ranks: Path) -> None:
    for name in (
        "config.json",
        "tokenizer.json",
        "recipe.toml",
        "checkpoint/step-6/checksums.json",
    ):
        assert (two_ranks / name).is_file(), name


def test_resume_at_the_same_world_size_is_bit_for_bit(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    run_distributed(train_job, 2, assets, tmp_path / "run", training__steps=3)
    run_distributed(train_job, 2, assets, tmp_path / "run")
    final = "checkpoint/step-6"
    assert largest_difference(two_ranks / final, tmp_path / "run" / final) == 0.0
    assert losses_of(two_ranks) == losses_of(tmp_path / "run")


@pytest.mark.parametrize("world_size", [1, 4])
def test_resume_at_another_world_size_is_equal_to_rounding(
    assets: Path, two_ranks: Path, tmp_path: Path, world_size: int
) -> None:
    run_distributed(train_job, 2, assets, tmp_path / "run", training__steps=3)
    run_distributed(train_job, world_size, assets, tmp_path / "run")
    final = "checkpoint/step-6"
    torch.testing.assert_close(
        losses_of(tmp_path / "run"), losses_of(two_ranks), rtol=2e-5, atol=2e-5
    )
    loaders = [
        (run / final / "dataloader.json").read_text() for run in (two_ranks, tmp_path / "run")
    ]
    assert loaders[0] == loaders[1]


def test_accumulation_and_recomputation_give_the_same_losses(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    run_distributed(
        train_job,
        2,
        assets,
        tmp_path / "run",
        training__local_batch_size=1,
        activation_checkpoint__mode="full",
    )
    torch.testing.assert_close(
        losses_of(tmp_path / "run"), losses_of(two_ranks), rtol=2e-5, atol=2e-5
    )


def test_replicas_of_shards_give_the_same_losses(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    run_distributed(
        train_job, 4, assets, tmp_path / "run", parallelism__data_parallel_replicate_degree=2
    )
    torch.testing.assert_close(
        losses_of(tmp_path / "run"), losses_of(two_ranks), rtol=2e-5, atol=2e-5
    )


def test_init_starts_at_step_zero_from_published_weights(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    from flame.checkpoint.convert import convert

    convert(str(two_ranks), tmp_path / "published", "hf")
    run_distributed(
        train_job,
        1,
        assets,
        tmp_path / "run",
        model__init=str(tmp_path / "published"),
        training__steps=1,
        optimizer__lr=1e-9,
    )
    start, base = (
        tensors_of(tmp_path / "run/checkpoint/step-1"),
        tensors_of(two_ranks / "checkpoint/step-6"),
    )
    name = "model.layers.0.attn.q_proj.weight"
    torch.testing.assert_close(start[name], base[name], rtol=0, atol=1e-7)
    assert losses_of(tmp_path / "run")[0] < losses_of(two_ranks)[0] - 0.3


def continue_pruned(run: Path, steps: int) -> None:
    """What `slimstate train --config RUN/recipe.toml --training.steps N` does."""
    from flame.train import STAGE
    from flame.train import run as train_stage

    train_stage(STAGE.parse(["--config", str(run / "recipe.toml"), f"--training.steps={steps}"]))


def test_a_pruned_run_trains_on_where_it_stood(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    """Step, schedule, data position and moments come along; channels of the moments are cut."""
    from pruning import prune

    pruned = tmp_path / "pruned"
    config = tmp_path / "wide"
    run_distributed(train_job, 2, assets, config, model__config=str(wide_config(assets, tmp_path)))
    prune.run(prune.STAGE.parse([str(config), str(pruned), "--method", "l1", "--ratio", "0.5"]))
    before, cut = tensors_of(config / "checkpoint/step-6"), tensors_of(pruned / "checkpoint/step-6")
    kept = json.loads((pruned / "plan.json").read_text())["spaces"]["layers.0.key"]
    rows = [head * 32 + channel for head, channels in enumerate(kept) for channel in channels]
    name = "optimizer.state.model.layers.0.attn.k_proj.weight.exp_avg_sq"
    assert before[name].abs().sum() > 0
    assert torch.equal(cut[name], before[name][rows])
    run_distributed(continue_pruned, 2, pruned, 8)
    assert (pruned / "checkpoint/step-8").is_dir()
    losses = losses_of(pruned)
    assert len(losses) == 2 and losses[0] < losses_of(config)[0]
    loaders = [
        json.loads((step / "dataloader.json").read_text())["next_sequence"]
        for step in (config / "checkpoint/step-6", pruned / "checkpoint/step-8")
    ]
    assert loaders[1] - loaders[0] == 2 * 8
    step = tensors_of(pruned / "checkpoint/step-8")["optimizer.state.lm_head.weight.step"]
    assert float(step) == 8


def wide_config(assets: Path, folder: Path) -> Path:
    """The tiny model with 32 key channels, so that half of them is a width that is allowed."""
    path = folder / "wide.json"
    path.write_text(json.dumps(TINY | {"head_dim": 32, "expand_v": 0.75}))
    return path


# LoRA and gradients ---------------------------------------------------------------------------


def gathered_gradients(job: Any) -> dict[str, torch.Tensor]:
    """Full gradients of the first global batch, by parameter name."""
    from torch.distributed.tensor import DTensor

    import flame.register  # noqa: F401
    from flame.model import copy_full
    from flame.training.trainer import Trainer

    trainer = Trainer(job)
    trainer.step = 1
    trainer.optimizers.step = lambda *_: None
    # As initialised, B is zero and would hide every gradient of A.
    for name, parameter in trainer.model_parts[0].named_parameters():
        if ".lora_B." in name:
            generator = torch.Generator().manual_seed(len(name))
            copy_full(parameter, torch.randn(parameter.shape, generator=generator) / 10)
    job.training.max_norm = 1e9
    trainer.train_step(trainer.next_batches())
    gradients = {}
    for name, parameter in trainer.model_parts[0].named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad
            gradients[name] = whole.full_tensor() if isinstance(whole, DTensor) else whole.clone()
    trainer.close()
    return gradients


def gradients_job(assets: Path, out: Path, **overrides: Any) -> dict[str, torch.Tensor]:
    return gathered_gradients(make_job(assets, out, **overrides))


def assert_same_gradients(one: dict[str, Any], many: dict[str, Any]) -> None:
    assert one.keys() == many.keys()
    for name, expected in one.items():
        scale = float(expected.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(many[name], expected, rtol=1e-4, atol=1e-5 * scale + 1e-9)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gathered_gradients_equal_one_process(
    assets: Path, two_ranks: Path, tmp_path: Path, lora_rank: int
) -> None:
    options = {
        "lora__rank": lora_rank,
        "model__init": str(two_ranks),
        "metrics__enable_tensorboard": False,
    }
    one = run_distributed(gradients_job, 1, assets, tmp_path / "one", **options)[0]
    many = run_distributed(gradients_job, 2, assets, tmp_path / "two", **options)
    assert any(name.endswith("dt_bias") for name in one)
    assert lora_rank == 0 or any(".lora_B." in name for name in one)
    for gradients in many:
        assert_same_gradients(one, gradients)


@pytest.fixture(scope="module")
def lora_run(assets: Path, two_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    run_distributed(
        train_job, 2, assets, run, lora__rank=4, lora__alpha=8.0, model__init=str(two_ranks)
    )
    return run


def test_lora_checkpoint_holds_what_was_trained_in_pefts_names(lora_run: Path) -> None:
    names = [
        n for n in tensors_of(lora_run / "checkpoint/step-6") if not n.startswith("optimizer.")
    ]
    assert "base_model.model.model.layers.0.attn.q_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.1.attn_norm.weight" in names
    assert not any("embeddings" in n or "base_layer" in n for n in names)


def test_merged_model_equals_base_plus_adapters(
    lora_run: Path, two_ranks: Path, tmp_path: Path
) -> None:
    """Logits of the merged run, exported, in the stock class against peft on the base."""
    from peft import inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    import flame.register  # noqa: F401
    from flame.checkpoint.convert import convert
    from flame.checkpoint.load import load_model
    from flame.checkpoint.reference import resolve
    from flame.lora.names import peft_name
    from flame.recipe.sections import Lora
    from flame.recovery.lora import peft_config

    adapted = load_model(resolve(str(two_ranks)))
    inject_adapter_in_model(peft_config(Lora(rank=4, alpha=8.0)), adapted)
    trained = tensors_of(lora_run / "checkpoint/step-6")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if peft_name(name) in trained:
                parameter.copy_(trained[peft_name(name)])
    convert(lora_run / "merged", tmp_path / "export", "hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokens = torch.randint(300, (2, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
        actual = merged.eval()(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_lora_resumes_bit_for_bit(
    assets: Path, two_ranks: Path, lora_run: Path, tmp_path: Path
) -> None:
    options = {"lora__rank": 4, "lora__alpha": 8.0, "model__init": str(two_ranks)}
    run_distributed(train_job, 2, assets, tmp_path / "run", training__steps=3, **options)
    run_distributed(train_job, 2, assets, tmp_path / "run", **options)
    final = "checkpoint/step-6"
    assert largest_difference(lora_run / final, tmp_path / "run" / final) == 0.0


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        ({"parallelism__tensor_parallel_degree": 2}, 2, "tensor_parallel_degree"),
        ({"training__global_batch_size": -1}, 1, "global_batch_size must be set"),
        ({"training__global_batch_size": 7}, 2, "global batch of 7"),
        ({"data__virtual_shards": 3}, 2, "virtual shards"),
        ({"optimizer__lr": float("nan")}, 1, "optimizer.lr"),
        ({"lora__rank": 4}, 1, "--init"),
        ({"training__steps": 0}, 1, "training.steps"),
        ({"model__config": "/no/such/file"}, 1, "model.config"),
        ({"checkpoint__async_mode": "sometimes"}, 1, "async_mode"),
        ({"training__dataset": "c4"}, 1, "nothing here reads it: name the text in data.dataset"),
        ({"training__enable_cpu_offload": True}, 1, "enable_cpu_offload is True, and nothing here"),
        ({"metrics__save_tb_folder": "/tmp/tb"}, 1, "inside the run folder"),
        ({"profiling__save_traces_folder": "a/../../b"}, 1, "inside the run folder"),
        ({"profiling__profile_freq": 3}, 1, "profiler_warmup"),
        ({"activation_checkpoint__selective_ac_option": "0"}, 1, "number of layers"),
    ],
)
def test_bad_jobs_are_refused(
    assets: Path, tmp_path: Path, overrides: dict[str, Any], world_size: int, words: str
) -> None:
    from flame.training.job_checks import check_job

    with pytest.raises(UserError, match=words):
        check_job(make_job(assets, tmp_path / "run", **overrides), world_size)
    assert not (tmp_path / "run").exists()


def test_tokens_beyond_the_vocabulary_are_refused(assets: Path, tmp_path: Path) -> None:
    from flame.training.job_checks import check_job

    small = tmp_path / "config.json"
    small.write_text(json.dumps(TINY | {"vocab_size": 100}))
    with pytest.raises(UserError, match="100"):
        check_job(make_job(assets, tmp_path / "run", model__config=str(small)), 1)
