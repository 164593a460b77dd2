"""Parameter groups and gradient clipping on models that mix sharded and replicated parameters."""

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
