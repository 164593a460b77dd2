"""Contract of every statistic, and the sums of the Gram matrix against the whole activations."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pruning.methods  # noqa: F401  (brings the statistics that methods need)
from flame.errors import UserError
from pruning.linalg import strong_rrqr
from pruning.spaces import Space
from pruning.statistics import QueryKeyGram, Source, Statistic
from pruning.taps import OpCall, tap_ops
from tests.distributed import run_distributed
from tests.pruning.families import build, tiny_config, tokens

SPACE = Space("layers.0.key", "key", 0, num_heads=3, head_dim=24, axes=())


def op_call(seed: int, length: int, rows: int = 1, dtype: torch.dtype = torch.float32) -> OpCall:
    """Queries and keys of unequal, correlated channels, two of them the same."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(-1))

    def draw() -> Tensor:
        x = torch.randn(rows, length, 3, 24, generator=generator) @ mixing
        x[..., 17] = x[..., 4]
        return nn.functional.silu(x).to(dtype)

    values, gates = torch.zeros(rows, length, 6, 4), torch.zeros(rows, length, 6)
    return OpCall(0, draw(), draw(), values, gates, gates, None)


SEEN: dict[Source, Callable[[int], Any]] = {Source.OP: lambda seed: op_call(seed, 40 + seed)}


def statistics() -> Iterator[type[Statistic]]:
    pending = list(Statistic.__subclasses__())
    while pending:
        found = pending.pop()
        pending += found.__subclasses__()
        # Other tests may define statistics of their own.
        if found.__module__.startswith("pruning."):
            yield found


def of(kind: type[Statistic], seeds: Any) -> Statistic:
    total = kind.zeros(SPACE)
    for seed in seeds:
        total.update(SEEN[kind.source](seed))
    return total


def assert_equal_sums(left: Statistic, right: Statistic, rtol: float = 0.0) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=0.0)


@pytest.mark.parametrize("kind", statistics())
def test_sums_of_shards_are_the_sums_of_the_whole(kind: type[Statistic]) -> None:
    whole = of(kind, range(6))
    merged = of(kind, range(0, 6, 2)).merge_(of(kind, range(1, 6, 2)))
    assert_equal_sums(merged, whole, rtol=1e-13)
    assert_equal_sums(of(kind, range(6)).merge_(kind.zeros(SPACE)), whole)


@pytest.mark.parametrize("kind", statistics())
def test_saved_sums_are_resumed(kind: type[Statistic]) -> None:
    whole, begun, resumed = of(kind, range(6)), of(kind, range(3)), kind.zeros(SPACE)
    resumed.load_state_dict({name: t.clone() for name, t in begun.state_dict().items()})
    for seed in range(3, 6):
        resumed.update(SEEN[kind.source](seed))
    assert_equal_sums(resumed, whole)


@pytest.mark.parametrize("kind", statistics())
def test_saved_sums_of_another_shape_are_refused(kind: type[Statistic]) -> None:
    saved = of(kind, [1]).state_dict()
    name = next(iter(saved))
    with pytest.raises(ValueError, match=name):
        kind.zeros(SPACE).load_state_dict(saved | {name: saved[name][..., :-1]})
    with pytest.raises(ValueError, match=name):
        kind.zeros(SPACE).load_state_dict(saved | {name: saved[name].to(torch.float16)})
    with pytest.raises(ValueError, match="the saved state"):
        kind.zeros(SPACE).load_state_dict({"other": saved[name]})


@pytest.mark.parametrize("kind", statistics())
def test_every_sum_is_float64_or_a_count_and_does_not_grow(kind: type[Statistic]) -> None:
    few, many = of(kind, range(1)).state_dict(), of(kind, range(9)).state_dict()
    for name in few:
        assert few[name].dtype in (torch.float64, torch.int64)
        assert few[name].shape == many[name].shape
        per_head = few[name].numel() / SPACE.num_heads
        assert per_head <= 4 * SPACE.head_dim**2


def reduced(world: int, rank: int, kind: type[Statistic]) -> dict[str, Tensor]:
    total = of(kind, range(rank, 13, world)).all_reduce_()
    return total.state_dict()


def reduce_on_this_rank(kind: type[Statistic]) -> dict[str, Tensor]:
    import torch.distributed as dist

    return reduced(dist.get_world_size(), dist.get_rank(), kind)


@pytest.mark.parametrize("kind", statistics())
def test_all_reduced_sums_are_those_of_one_process(kind: type[Statistic]) -> None:
    alone = of(kind, range(13))
    assert_equal_sums(of(kind, range(13)).all_reduce_(), alone)
    for world in (2, 4):
        for state in run_distributed(reduce_on_this_rank, world, kind):
            total = kind.zeros(SPACE)
            total.load_state_dict(state)
            assert_equal_sums(total, alone, rtol=1e-13)


def test_the_selection_is_that_of_the_whole_matrix_at_every_world_size() -> None:
    calls = [op_call(seed, 40 + seed) for seed in range(13)]
    whole = torch.cat([torch.cat([c.q, c.k], 1) for c in calls], 1)[0].double().transpose(0, 1)
    expected = strong_rrqr(whole.mT @ whole, 12)
    for world in (1, 2, 4):
        for state in run_distributed(reduce_on_this_rank, world, QueryKeyGram):
            assert torch.equal(strong_rrqr(state["gram"], 12), expected)


def test_the_gram_matrix_is_that_of_all_queries_and_keys() -> None:
    calls = [op_call(1, 30, rows=2), op_call(2, 1), op_call(3, 0), op_call(4, 64)]
    total = QueryKeyGram.zeros(SPACE)
    for call in calls:
        total.update(call)
    rows = torch.cat([x.flatten(0, 1) for call in calls for x in (call.q, call.k)]).double()
    torch.testing.assert_close(
        total.gram, torch.einsum("thi,thj->hij", rows, rows), rtol=1e-13, atol=1e-12
    )
    assert int(total.tokens) == 60 + 1 + 0 + 64


def test_products_of_low_precision_activations_are_exact() -> None:
    call = op_call(1, 50, dtype=torch.bfloat16)
    total = QueryKeyGram.zeros(SPACE)
    total.update(call)
    q, k = call.q.double()[0], call.k.double()[0]
    expected = torch.einsum("thi,thj->hij", q, q) + torch.einsum("thi,thj->hij", k, k)
    torch.testing.assert_close(total.gram, expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["q", "k"])
def test_what_is_not_finite_is_named_and_not_added(name: str, value: float) -> None:
    total = of(QueryKeyGram, [1])
    call = op_call(2, 20)
    call.layer = 7
    getattr(call, name)[0, 11, 2, 5] = value
    with pytest.raises(UserError, match=f"layer 7: {name} .* delta-rule call"):
        total.update(call)
    assert_equal_sums(total, of(QueryKeyGram, [1]))


def calibrate_sharded() -> list[Tensor]:
    """Gram matrices of a model under FSDP2, each rank with its share of the sequences."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from pruning.adapters import adapter_for

    config = tiny_config("gated_deltanet")
    model: Any = build(config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return gram_matrices(model, adapter_for(config), dist.get_rank(), dist.get_world_size())


def gram_matrices(model: Any, adapter: Any, rank: int, world: int) -> list[Tensor]:
    spaces = adapter.spaces(model.config.to_dict())
    totals = {space.layer: QueryKeyGram.zeros(space) for space in spaces}
    with torch.no_grad(), tap_ops(model, adapter, lambda call: totals[call.layer].update(call)):
        for sequence in range(rank, 4, world):
            model(tokens(1, 90, seed=sequence))
    return [total.all_reduce_().gram for total in totals.values()]


def test_a_sharded_model_is_tapped_and_gives_the_same_sums() -> None:
    from pruning.adapters import adapter_for

    config = tiny_config("gated_deltanet")
    alone = gram_matrices(build(config), adapter_for(config), 0, 1)
    assert all(float(gram.diagonal(dim1=-2, dim2=-1).min()) > 0 for gram in alone)
    for shared in run_distributed(calibrate_sharded, 2):
        for ours, theirs in zip(shared, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
            assert torch.equal(strong_rrqr(ours, 8), strong_rrqr(theirs, 8))
