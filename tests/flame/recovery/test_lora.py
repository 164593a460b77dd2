"""Adapters against peft: DoRA's forward, merging, peft folders; what resumes; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flame.errors import UserError
from flame.lora.names import peft_name
from flame.recipe.sections import Lora
from flame.recovery.lora import check_targets, initialise_adapters, inject, load_adapters
from tests.distributed import run_distributed
from tests.flame.jobs import largest_difference, make_job, tensors_of, train_job
from tests.flame.tiny import (
    GATED_DELTANET,
    build,
    stored_tensors,
)
from tests.memory_source import MemorySource

TOKENS = torch.arange(40)[None] % 67


def randomise(model: nn.Module) -> None:
    """Set the adapters to random values that depend on their names alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                values = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(values + 0.5 if "magnitude" in name else values - 0.5)


def by_peft(lora: Lora, config: dict[str, Any] = GATED_DELTANET) -> nn.Module:
    """peft's own model: its layers on the tests' weights, its adapters random."""
    from peft import get_peft_model

    from flame.recovery.lora import peft_config

    model = build(config)
    return get_peft_model(model, peft_config(lora))


def by_us(lora: Lora, config: dict[str, Any] = GATED_DELTANET) -> nn.Module:
    """The model as a training job makes it, on one process."""
    from flame.model import meta_model, restore_after_to_empty

    model = meta_model(config)
    inject(model, lora)
    model.to_empty(device="cpu")
    restore_after_to_empty(model)
    values = stored_tensors(build(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                parameter.copy_(values[name.replace(".base_layer.", ".")])
    initialise_adapters(model, seed=0)
    return model


def by_peft_name(model: nn.Module) -> dict[str, nn.Parameter]:
    prefix = "base_model.model."
    return {peft_name(n.removeprefix(prefix)): p for n, p in model.named_parameters()}


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    values = by_peft_name(source)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(values[peft_name(name)])


OPTIONS = [
    Lora(rank=4, alpha=8.0, target_modules=["q_proj", "o_proj"]),
    Lora(rank=4, alpha=8.0, dora=True),
    Lora(rank=4, alpha=8.0, dora=True, dropout=0.3, target_modules=["v_proj"]),
]


@pytest.mark.parametrize("lora", OPTIONS, ids=["lora", "dora", "dora dropout"])
def test_forward_and_gradients_equal_pefts(lora: Lora) -> None:
    theirs = by_peft(lora)
    randomise(theirs)
    ours = by_us(lora)
    copy_adapters(theirs, ours)
    gradients = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        model.train()(TOKENS).logits.square().mean().backward()
        named = by_peft_name(model).items()
        gradients.append({name: p.grad for name, p in named if ".lora_" in name})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lora", OPTIONS[:2], ids=["lora", "dora"])
def test_new_adapters_leave_the_model_as_it_was(lora: Lora) -> None:
    adapted, plain = by_us(lora), build(GATED_DELTANET)
    torch.testing.assert_close(adapted(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)
    other = by_us(lora)
    for (name, one), two in zip(adapted.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_dora_in_bf16_scales_by_fp32_ratios() -> None:
    """A magnitude that grew by a part in 1,000 shows: bf16 itself has steps of one in 256."""
    lora = Lora(rank=4, alpha=8.0, dora=True, target_modules=["q_proj"])
    layer = by_us(lora).model.layers[0].attn.q_proj
    states = torch.randn(50, 24)
    with torch.no_grad():
        before = layer.to(torch.bfloat16)(states.bfloat16())
        magnitude = layer.lora_magnitude_vector["default"]
        magnitude.weight.data = layer.base_layer.weight.float().norm(dim=1) * 1.001
        added = magnitude(
            states.bfloat16(),
            lora_A=layer.lora_A["default"],
            lora_B=layer.lora_B["default"],
            scaling=2.0,
            base_layer=layer.base_layer,
            base_result=before,
        )
    torch.testing.assert_close(added.float(), 0.001 * before.float(), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"train_also": []}, set()),
        ({"train_also": [], "bias": "all"}, {"q_proj", "o_proj", "mlp"}),
        ({"train_also": [], "bias": "lora_only"}, {"q_proj"}),
        ({"train_also": ["norm"]}, {"norm"}),
    ],
)
def test_what_is_trained_beside_the_adapters(options: dict[str, Any], trained: set[str]) -> None:
    model = build(LLAMA_BIASED)
    inject(model, Lora(rank=2, target_modules=["q_proj"], **options))
    others = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    known = ("q_proj", "o_proj", "mlp", "norm")
    assert {part for name in others for part in known if part in name} == trained
    if options.get("bias") == "all":
        assert all(name.endswith("bias") for name in others)


LLAMA_BIASED = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 67,
    "attention_bias": True,
    "mlp_bias": True,
}


# Merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging_equals_pefts_to_the_rounding_of_the_dtype(dtype: torch.dtype, dora: bool) -> None:
    """In bf16 the sum is taken in fp32 and rounded once: never further off than peft's own."""
    from flame.lora.source import LoraSource
    from flame.recovery.lora import peft_config

    lora = Lora(rank=4, alpha=8.0, dora=dora, target_modules=["q_proj", "o_proj"])
    theirs = by_peft(lora)
    randomise(theirs)
    exact = {n: p.detach().to(dtype).double() for n, p in theirs.named_parameters()}
    named = by_peft_name(theirs).items()
    trained = {name: p.detach().to(dtype) for name, p in named if ".lora_" in name}
    base = {n: t.to(dtype) for n, t in stored_tensors(build(GATED_DELTANET)).items()}
    source = LoraSource(MemorySource(base), MemorySource(trained), peft_config(lora).to_dict())
    merged = theirs.to(dtype).merge_and_unload()
    for name, parameter in merged.named_parameters():
        if "q_proj" not in name and "o_proj" not in name:
            continue
        assert source.read(name).dtype == dtype
        expected = merged_exactly(exact, name.removesuffix(".weight"), dora)
        own = (source.read(name).double() - expected).abs().max()
        peft = (parameter.double() - expected).abs().max()
        step = torch.finfo(dtype).eps * expected.abs().max()
        assert own <= max(peft, step), (name, own, peft)
        torch.testing.assert_close(source.read(name, slice(3, 7)), source.read(name)[3:7])


def merged_exactly(tensors: dict[str, Tensor], module: str, dora: bool) -> Tensor:
    prefix = f"base_model.model.{module}"
    update = tensors[f"{prefix}.lora_B.default.weight"] @ tensors[f"{prefix}.lora_A.default.weight"]
    merged = tensors[f"{prefix}.base_layer.weight"] + 2 * update
    if not dora:
        return merged
    length = tensors[f"{prefix}.lora_magnitude_vector.default.weight"]
    return merged * (length / merged.norm(dim=1))[:, None]


# Runs and peft folders -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(two_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' run as a Hugging Face folder."""
    from flame.checkpoint.convert import convert

    folder = tmp_path_factory.mktemp("published") / "hf"
    convert(two_ranks, folder, "hf")
    return folder


@pytest.fixture(scope="module")
def dora_run(assets: Path, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of DoRA with dropout on two processes, undisturbed."""
    run = tmp_path_factory.mktemp("dora") / "run"
    run_distributed(train_job, 2, assets, run, **dora_options(published), training__steps=2)
    return run


def dora_options(base: Path) -> dict[str, Any]:
    options = {"rank": 4, "alpha": 8.0, "dora": True, "dropout": 0.2, "merge": False}
    return {"model__init": str(base), **{f"lora__{k}": v for k, v in options.items()}}


def test_dropout_resumes_bit_for_bit(
    assets: Path, published: Path, dora_run: Path, tmp_path: Path
) -> None:
    options = dora_options(published)
    run_distributed(train_job, 2, assets, tmp_path / "run", **options, training__steps=1)
    run_distributed(train_job, 2, assets, tmp_path / "run", **options, training__steps=2)
    final = "checkpoint/step-2"
    assert largest_difference(dora_run / final, tmp_path / "run" / final) == 0.0


def test_peft_loads_the_adapters_of_a_sharded_run(
    published: Path, dora_run: Path, tmp_path: Path
) -> None:
    """`PeftModel` on the base ≡ the merged run ≡ the peft folder as a model reference."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import flame.register  # noqa: F401
    from flame.checkpoint.load import load_model
    from flame.checkpoint.reference import resolve
    from flame.convert import STAGE, check, run

    options = STAGE.parse([str(dora_run), str(tmp_path / "adapter"), "--to", "peft"])
    check(options)
    run(options)
    base = AutoModelForCausalLM.from_pretrained(published)
    plain = base(TOKENS).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = TOKENS
    with torch.no_grad():
        theirs = adapted(tokens).logits
        for model in (dora_run, tmp_path / "adapter"):
            merged = load_model(resolve(model))(tokens).logits
            torch.testing.assert_close(merged, theirs, rtol=1e-4, atol=1e-5)
    assert float((theirs - plain.detach()).abs().max()) > 1e-3
    # What was trained in full beside the adapters came along.
    step = tensors_of(dora_run / "checkpoint/step-2")
    names = [name for name in step if name.endswith("attn_norm.weight")]
    norms = [adapted.get_parameter(n) for n in names if not n.startswith("optimizer.")]
    assert norms and all(bool((norm != 1).any()) for norm in norms)


def test_peft_folders_are_started_from(
    assets: Path, published: Path, dora_run: Path, tmp_path: Path
) -> None:
    """`lora.init`, at another world size: the first step starts at the adapters' values."""
    from flame.checkpoint.convert import convert

    convert(dora_run, tmp_path / "adapter", "peft")
    options = {**dora_options(published), "lora__init": str(tmp_path / "adapter")}
    still = {"training__steps": 1, "optimizer__lr": 1e-12, "optimizer__weight_decay": 0.0}
    run_distributed(train_job, 1, assets, tmp_path / "run", **options, **still)
    before = tensors_of(dora_run / "checkpoint/step-2")
    after = tensors_of(tmp_path / "run/checkpoint/step-1")
    for name, tensor in before.items():
        if not name.startswith("optimizer."):
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)


def test_adapters_of_another_shape_are_not_started_from(tmp_path: Path) -> None:

    model = by_us(Lora(rank=4))
    stored = {peft_name(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    load_adapters(model, MemorySource(stored))
    name = "base_model.model.model.layers.0.attn.q_proj.lora_A.weight"
    cases = {
        "the model to be trained has no other": {**stored, "other": torch.zeros(1)},
        "lora.init has no .*lora_A": {k: v for k, v in stored.items() if k != name},
        r"has shape \(2, 24\), \[lora\] asks for \(4, 24\)": {**stored, name: torch.zeros(2, 24)},
    }
    for words, tensors in cases.items():
        with pytest.raises(UserError, match=words):
            load_adapters(model, MemorySource(tensors))


def test_merge_is_an_option_of_the_command() -> None:
    from flame.train import STAGE

    assert "--lora.merge" in STAGE.parse(["--config", "recipe.toml", "--merge"]).arguments


def test_only_adapters_become_a_peft_folder(two_ranks: Path, tmp_path: Path) -> None:
    from flame.checkpoint.convert import convert

    with pytest.raises(UserError, match="holds no adapters"):
        convert(two_ranks, tmp_path / "adapter", "peft")
    assert not (tmp_path / "adapter").exists()


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_porj"]}, "did you mean q_proj"),
        ({"target_modules": ["lm_head"]}, "the output projection"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"bias": "some"}, "bias is 'some'.*lora_only"),
        ({"rank": 0, "dora": True}, "lora.dora is set and lora.rank is 0"),
        ({"init": "BASE"}, "holds no adapters"),
    ],
)
def test_lora_sections_are_refused_before_work(
    assets: Path, two_ranks: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    from flame.training.job_checks import check_job

    options = {"rank": 4, **options}
    if "init" in options:
        options["init"] = str(two_ranks)
    overrides = {f"lora__{name}": value for name, value in options.items()}
    with pytest.raises(UserError, match=words):
        check_job(make_job(assets, tmp_path / "run", model__init=str(two_ranks), **overrides), 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["o_prj"], "did you mean o_proj"),
        (["zzz"], "choose from"),
        ([""], "names ''"),
    ],
)
def test_names_of_modules_are_refused_with_a_suggestion(
    assets: Path, tmp_path: Path, modules: list[str], words: str
) -> None:
    from flame.training.job_checks import check_job

    with pytest.raises(UserError, match=words):
        check_job(make_job(assets, tmp_path / "run", trainable__modules=modules), 1)


def test_named_modules_and_adapters_exclude_each_other(assets: Path, two_ranks: Path) -> None:
    from flame.training.job_checks import check_job

    job = make_job(
        assets, assets / "x", model__init=str(two_ranks), lora__rank=2, trainable__modules=["q"]
    )
    with pytest.raises(UserError, match="both set"):
        check_job(job, 1)


def test_tied_output_projections_are_no_target() -> None:
    with pytest.raises(UserError, match="the output projection"):
        check_targets(build(GATED_DELTANET | {"tie_word_embeddings": True}), ["lm_head"])


def test_targets_in_softmax_layers_alone_are_refused_in_a_hybrid() -> None:
    from flame.model import meta_model
    from tests.pruning.hybrids import CONFIGS

    model = meta_model(CONFIGS["qwen3_5_text"])
    with pytest.raises(UserError, match=r"such as in_proj_qkv,in_proj_z,out_proj$"):
        check_targets(model, ["q_proj", "k_proj", "v_proj"])
    check_targets(model, ["q_proj", "in_proj_qkv"])
