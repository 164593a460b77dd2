"""The estimate of memory against what a real job of two processes holds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flame.errors import UserError
from tests.distributed import run_distributed
from tests.flame.jobs import TINY, make_job


def held(assets: Path, out: Path, options: dict[str, Any]) -> dict[str, int]:
    """Bytes on this rank after a step: parameters, gradients, optimizer, teacher; saved tensors."""
    import flame.register  # noqa: F401
    from flame.training.trainer import Trainer

    trainer = Trainer(make_job(assets, out, metrics__enable_tensorboard=False, **options))
    trainer.step = 1
    saved = saved_bytes(lambda: trainer.objective(*next(trainer.dataloader)))
    trainer.train_step(trainer.next_batches())
    (model,) = trainer.model_parts
    moments = [
        value for state in trainer.optimizers.optimizers[0].state.values()
        for value in state.values()
    ]  # fmt: skip
    teacher = trainer.objective.teacher
    found = {
        "parameters": bytes_of(model.parameters()),
        "gradients": bytes_of(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": bytes_of(moments),
        "teacher": bytes_of(teacher.model.parameters()) if teacher else 0,
        "saved": saved,
    }
    trainer.close()
    return found


def bytes_of(tensors: Any) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(tensor.nbytes for tensor in local)


def saved_bytes(run: Any) -> int:
    """Bytes that autograd keeps of `run()`: distinct storages, parameters left out."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(seen.values())


@pytest.mark.parametrize("mode", ["full", "lora", "distilled"])
def test_what_is_counted_is_what_a_rank_holds(
    assets: Path, two_ranks: Path, tmp_path: Path, mode: str
) -> None:
    from flame.training.estimate import estimate

    options: dict[str, Any] = {"training__mixed_precision_param": "float32"}
    if mode == "lora":
        options |= {"lora__rank": 3, "model__init": str(two_ranks)}
    if mode == "distilled":
        options |= {"distill__teacher": str(two_ranks)}
    parts = {p.name: p for p in estimate(make_job(assets, tmp_path / "run", **options), 2)}
    first, second = run_distributed(held, 2, assets, tmp_path / "run", options)
    for name in ("parameters", "gradients", "optimizer", "teacher"):
        if name in parts:
            assert parts[name].counted
            assert parts[name].bytes == first[name] >= second[name], name
    assert ("teacher" in parts) == (mode == "distilled")


def test_activations_are_of_the_right_order(assets: Path, tmp_path: Path) -> None:
    """The CPU's operators keep other tensors than fused kernels: within a factor of three."""
    from flame.training.estimate import estimate

    options = {"training__mixed_precision_param": "float32"}
    parts = {p.name: p for p in estimate(make_job(assets, tmp_path / "run", **options), 1)}
    (found,) = run_distributed(held, 1, assets, tmp_path / "run", options)
    assert not parts["activations"].counted
    assert 1 / 3 < parts["activations"].bytes / found["saved"] < 3


WIDE = {"hidden_size": 512, "num_heads": 4, "head_dim": 64, "num_hidden_layers": 4}


def peak_on_gpu(assets: Path, out: Path, options: dict[str, Any]) -> int:
    """Most bytes that two steps of a job of one process allocate."""
    from flame.train import train

    train(make_job(assets, out, metrics__enable_tensorboard=False, **options))
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_total_is_near_the_peak_on_a_gpu(assets: Path, tmp_path: Path) -> None:
    """Not run so far: written where there is no GPU."""
    from flame.training.estimate import estimate

    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY | WIDE))
    options = {
        "model__config": str(config), "training__seq_len": 512, "training__steps": 2,
        "training__local_batch_size": 4, "lr_scheduler__total_steps": 2,
    }  # fmt: skip
    total = sum(p.bytes for p in estimate(make_job(assets, tmp_path / "run", **options), 1))
    (peak,) = run_distributed(peak_on_gpu, 1, assets, tmp_path / "run", options)
    assert 1 / 2 < total / peak < 2


def test_replicas_share_no_weights(assets: Path, tmp_path: Path) -> None:
    from flame.training.estimate import estimate

    def parameters(world_size: int, replicas: int) -> int:
        options = {"parallelism__data_parallel_replicate_degree": replicas}
        return estimate(make_job(assets, tmp_path / "run", **options), world_size)[0].bytes

    assert parameters(4, 2) == parameters(2, 1)
    assert parameters(4, 1) < parameters(2, 1) < parameters(1, 1)


def test_the_command_prints_a_table_and_starts_nothing(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flame.recipe import recipe_text
    from launch.cli import dispatch

    recipe = tmp_path / "recipe.toml"
    job = make_job(assets, tmp_path / "run", data__virtual_shards=8, training__global_batch_size=16)
    recipe.write_text(recipe_text(job))
    words = ["train", "--config", str(recipe), "--estimate", "--nnodes", "2", "--nproc", "4"]
    dispatch([*words, "--rdzv-endpoint", "nowhere:1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Memory of one GPU of 8 (2 x 4), 1 x 8 replicas x shards, 2 seq")
    names = [line[:20].strip() for line in lines[3:-2]]
    fresh = r"0\.0 GiB while it draws fresh weights, at most \d MiB of plans while a step is saved"
    assert re.fullmatch(f"rank 0 besides, in the host's memory: {fresh}", lines[-1])
    assert names == [
        "parameters", "gradients", "optimizer", "gathered weights", "logits of a chunk",
        "activations", "total",
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="3 processes do not divide 8 virtual shards"):
        dispatch([*words[:4], "--nproc", "3"])
