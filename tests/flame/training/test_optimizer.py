"""Parameter groups and gradient clipping on models that mix sharded and replicated parameters."""

from typing import Any

import pytest
import torch

from tests.distributed import run_distributed

CONFIG = {
    "model_type": "gated_deltanet",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "head_dim": 16,
    "expand_v": 1.5,
    "vocab_size": 64,
    "hidden_ratio": 2,
}


def grouped_names() -> dict[float, list[str]]:
    """Names of the parameters of a sharded model by their group's weight decay."""
    from flame.model import meta_model, shard
    from flame.process.distributed import data_parallel_mesh
    from flame.training.optimizer import parameter_groups

    model = shard(meta_model(CONFIG), data_parallel_mesh())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[float, list[str]] = {}
    for group in parameter_groups(model, 0.1):
        kinds = {type(parameter).__name__ for parameter in group["params"]}
        assert len(kinds) == 1, kinds
        found.setdefault(group["weight_decay"], []).extend(names[id(p)] for p in group["params"])
    return found


def test_no_decay_exactly_where_the_model_asks_for_none() -> None:
    (found,) = run_distributed(grouped_names, 1)
    assert sorted(name.rpartition(".")[2] for name in found[0.0]) == ["A_log", "dt_bias"]
    assert len(found[0.1]) > 10 and not {"A_log", "dt_bias"} & {
        name.rpartition(".")[2] for name in found[0.1]
    }


def clipped(max_norm: float) -> tuple[float, float, float]:
    """The norm before clipping, that of all gathered gradients after, and that of one process."""
    from torch.distributed.tensor import DTensor

    from flame.model import meta_model, shard
    from flame.process.distributed import data_parallel_mesh
    from flame.training.step.gradients import clip_gradients

    model = shard(meta_model(CONFIG), data_parallel_mesh()).to_empty(device="cpu")
    whole = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(number)
        whole[name] = torch.randn(parameter.shape, generator=generator)
        parameter.grad = sharded_like(parameter, whole[name])
    before = clip_gradients(list(model.parameters()), max_norm)
    gradients = [p.grad for p in model.parameters()]
    after = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    expected = torch.cat([value.flatten() for value in whole.values()]).norm()
    return float(before), float(torch.cat([g.flatten() for g in after]).norm()), float(expected)


def sharded_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value.clone()
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def test_clipping_counts_every_gradient_once() -> None:
    for before, after, expected in run_distributed(clipped, 2, 1.0):
        assert abs(before - expected) < 1e-4 * expected
        assert abs(after - 1.0) < 1e-4


def test_gradients_below_the_bound_are_left_alone() -> None:
    for _, after, expected in run_distributed(clipped, 2, 1e6):
        assert abs(after - expected) < 1e-4 * expected


def trained(implementation: str, finite: list[bool]) -> dict[str, torch.Tensor]:
    """Parameters and the optimizer's state after a step for each flag; a bad one's gradient is NaN.

    The gradients of a good step depend on how many good ones were before it.
    """
    from torch.distributed.tensor import DTensor

    from flame.model import meta_model, shard
    from flame.process.distributed import data_parallel_mesh
    from flame.recipe.sections import Optimizer
    from flame.training.optimizer import build_optimizers

    model = shard(meta_model(CONFIG), data_parallel_mesh()).to_empty(device="cpu")
    config: Any = Optimizer(implementation=implementation)  # type: ignore[arg-type]
    config.early_step_in_backward = False
    optimizers, good = build_optimizers([model], config), 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    for flag in finite:
        good += flag
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * good + number)
            value = torch.randn(parameter.shape, generator=generator)
            parameter.grad = sharded_like(parameter, value if flag else value * float("nan"))
        optimizers.step_if(torch.tensor(float(flag)))
    state = optimizers.optimizers[0].state
    found = {}
    for name, parameter in model.named_parameters():
        values = {"": parameter.detach(), **state[parameter]}
        for key, value in values.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found[f"{name} {key}"] = whole.clone()
    return found


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_a_step_that_is_not_finite_changes_nothing(implementation: str) -> None:
    (undisturbed,) = run_distributed(trained, 1, implementation, [True, True])
    (disturbed,) = run_distributed(trained, 1, implementation, [False, True, False, True, False])
    assert any(name.endswith(" step") for name in undisturbed)
    assert disturbed.keys() == undisturbed.keys()
    for name, expected in undisturbed.items():
        assert torch.equal(disturbed[name], expected), name
