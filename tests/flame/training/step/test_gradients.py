"""When gradients are summed over the ranks: counted, held in memory as estimated, and the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_distributed
from tests.flame.jobs import make_job
from tests.flame.training.test_trainer import assert_same_gradients, gradients_job

QUIET = {"metrics__enable_tensorboard": False}
GROUPS = 3
"""Of FSDP2 in the tiny model: two blocks and the rest."""


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called in the block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # It comes again with the parts of this rank.
            return NotImplemented
        if function.namespace in ("c10d", "_c10d_functional"):
            self.seen[function.name().partition("::")[2].strip("_")] += 1
        return function(*args, **(kwargs or {}))


def step_of(assets: Path, out: Path, options: dict[str, Any]) -> tuple[Counter, int]:
    """The collectives of a job's second step, and the gradients' bytes before the last batch."""
    import flame.register  # noqa: F401
    from flame.training.trainer import Trainer

    trainer = Trainer(make_job(assets, out, **QUIET, **options))
    trainer.step = 1
    trainer.train_step(trainer.next_batches())
    trainer.step = 2
    forward_backward, held = trainer.forward_backward_step, []

    def measured(**batch: Any) -> torch.Tensor:
        losses = forward_backward(**batch)
        held.append(whole_gradient_bytes(trainer.model_parts[0]))
        return losses

    trainer.forward_backward_step = measured
    with Collectives() as counted:
        trainer.train_step(trainer.next_batches())
    trainer.close()
    return counted.seen, held[-2]


def whole_gradient_bytes(model: torch.nn.Module) -> int:
    """Bytes of the gradients that FSDP2 holds in full."""
    from flame.private.torch_names import parameter_groups

    state = model._get_fsdp_state()
    groups = [group for part in state._state_ctx.all_states for group in parameter_groups(part)]
    held = 0
    for parameter in [p for group in groups for p in group.fsdp_params]:
        whole = getattr(parameter, "_unsharded_param", None)
        for gradient in (
            parameter.unsharded_accumulated_grad,
            None if whole is None else whole.grad,
        ):
            held += 0 if gradient is None else gradient.nbytes
    return held


@pytest.mark.parametrize("when", ["each_micro_batch", "once_a_step"])
def test_collectives_of_a_step_are_counted(assets: Path, tmp_path: Path, when: str) -> None:
    """Two blocks and four micro-batches; the all-reduces grow with neither.

    They are of the tokens' count, the replicated gradients, the norm and the figures.
    """
    from flame.training.estimate import estimate

    options = {"training__local_batch_size": 1, "parallelism__reduce_gradients": when}
    found = run_distributed(step_of, 2, assets, tmp_path / "run", options)
    parts = {p.name: p for p in estimate(make_job(assets, tmp_path / "run", **options), 2)}
    held = parts["unreduced gradients"].bytes if when == "once_a_step" else 0
    assert ("unreduced gradients" in parts) == (when == "once_a_step")
    for seen, bytes_ in found:
        assert seen["allgather_base"] == 4 * (2 * GROUPS - 1)
        assert seen["reduce_scatter_base"] == GROUPS * (4 if when == "each_micro_batch" else 1)
        assert seen["allreduce"] + seen["all_reduce"] == 4
        assert bytes_ == held


def test_one_micro_batch_holds_nothing_in_full(assets: Path, tmp_path: Path) -> None:
    from flame.training.estimate import estimate

    options = {"training__local_batch_size": 4, "parallelism__reduce_gradients": "once_a_step"}
    names = [part.name for part in estimate(make_job(assets, tmp_path / "run", **options), 2)]
    assert "unreduced gradients" not in names


@pytest.mark.parametrize(("world_size", "replicas", "lora_rank"), [(2, 1, 4), (4, 2, 0)])
def test_gradients_do_not_depend_on_when_they_are_reduced(
    assets: Path, two_ranks: Path, tmp_path: Path, world_size: int, replicas: int, lora_rank: int
) -> None:
    options = {
        **QUIET,
        "training__local_batch_size": 1,
        "lora__rank": lora_rank,
        "model__init": str(two_ranks),
        "parallelism__data_parallel_replicate_degree": replicas,
    }
    modes = [
        run_distributed(
            gradients_job, world_size, assets, tmp_path / when, **options,
            parallelism__reduce_gradients=when,
        )
        for when in ("each_micro_batch", "once_a_step")
    ]  # fmt: skip
    for each, once in zip(*modes, strict=True):
        assert any(name.endswith("dt_bias") for name in each)
        assert_same_gradients(each, once)


def uneven_sums() -> list[Any]:
    """The gradients of three parameters of which each rank's tokens reached some."""
    from flame.process.distributed import rank
    from flame.training.step.gradients import sum_replicated_gradients

    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (2, 3, 1)]
    parameters[rank()].grad = torch.full_like(parameters[rank()], 5.0)
    parameters[2].grad = torch.full_like(parameters[2], 1.0 + rank())
    sum_replicated_gradients(parameters)
    return [parameter.grad.tolist() for parameter in parameters if parameter.grad is not None]


def test_a_rank_whose_tokens_did_not_reach_a_parameter_adds_zeros() -> None:
    expected = [[5.0, 5.0], [5.0, 5.0, 5.0], [3.0]]
    assert run_distributed(uneven_sums, 2) == [expected, expected]
