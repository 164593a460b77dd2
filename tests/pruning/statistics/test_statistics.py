"""Contract of every statistic, and the sums of each against what they are sums of."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pruning.methods  # noqa: F401  (brings the statistics that methods need)
from pruning.layouts import Blocks, HeadMajor, SharedHeads
from pruning.linalg import strong_rrqr
from pruning.op_call import OpCall
from pruning.replay import Replay
from pruning.spaces import Axis, Space
from pruning.statistics import (
    GateInput,
    GradientShare,
    OutputPair,
    QueryKeyGram,
    QueryKeySample,
    Shard,
    Source,
    StateSpectra,
    Statistic,
    WeightGradientProducts,
)
from pruning.statistics.row_sample import row_sample
from pruning.taps import tap_ops
from tests.distributed import run_distributed
from tests.pruning.families import build, tiny_config, tokens
from tests.pruning.replays import replay_of

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


HIDDEN = 20
OUT = 24
HEADS, VALUES = (
    Space(f"layers.0.{kind}", kind, 0, 1, count, (Axis("o_proj.weight", 1, layout),))
    for kind, count, layout in (("head", 3, Blocks(3, 8)), ("value", 4, SharedHeads(6, 4)))
)


def hidden(seed: int) -> Tensor:
    return torch.randn(40 + seed, HIDDEN, generator=torch.Generator().manual_seed(seed))


def outputs(seed: int) -> Tensor:
    return torch.randn(40 + seed, OUT, generator=torch.Generator().manual_seed(seed))


def gate_inner(seed: int) -> Tensor:
    size = (40 + seed, VALUES.head_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def states(seed: int) -> Tensor:
    return torch.randn(1 + seed, 6, 5, 4, generator=torch.Generator().manual_seed(seed))


def share(seed: int) -> GradientShare:
    """The rows of a process: of 72, four that others do not have."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(4, 10, generator=generator) for _ in range(2)]
    space = replace(SPACE, axes=(Axis("q_proj.weight", 0, HeadMajor(3, 24)),))
    return GradientShare(space, {"q_proj.weight": Shard(rows[0], rows[1], 4 * seed)}, 40 + seed)


def replay(seed: int) -> Replay:
    """With 6 value heads of 4 channels, three key heads of 24."""
    return replay_of(op_call(seed, 5 + seed), seed)


SEEN: dict[Source, Callable[[int], Any]] = {
    Source.OP: lambda seed: op_call(seed, 40 + seed),
    Source.MIXER_INPUT: hidden,
    Source.OUTPUT: outputs,
    Source.OUTPUT_PAIR: lambda seed: OutputPair(outputs(seed), outputs(seed + 100)[: 40 + seed]),
    Source.GATE_INPUT: lambda seed: GateInput(seed % 2, gate_inner(seed)),
    Source.REPLAY: replay,
    Source.STATE: states,
    Source.WEIGHT_GRADIENT: share,
}


def zeros(kind: type[Statistic]) -> Statistic:
    """Of the key space where it serves that, else of another."""
    space = {"key": SPACE, "value": VALUES, "head": HEADS}[kind.kinds[0]]
    return kind.zeros(space, HIDDEN)


def statistics() -> Iterator[type[Statistic]]:
    pending = list(Statistic.__subclasses__())
    while pending:
        found = pending.pop()
        pending += found.__subclasses__()
        # Other tests may define statistics of their own.
        if found.__module__.startswith("pruning."):
            yield found


def of(kind: type[Statistic], seeds: Any) -> Statistic:
    total = zeros(kind)
    for seed in seeds:
        total.update(SEEN[kind.source](seed))
    return total


def added(one: Statistic, other: Statistic) -> Statistic:
    """The sums of two parts, added field by field."""
    sums = other.state_dict()
    return type(one)(**{name: total + sums[name] for name, total in one.state_dict().items()})


def assert_equal_sums(left: Statistic, right: Statistic, rtol: float = 0.0) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        # Where terms cancel, rounding is a part of what is added up, not of the sum.
        scale = float(theirs[name].double().abs().max())
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("kind", statistics())
def test_sums_of_shards_are_the_sums_of_the_whole(kind: type[Statistic]) -> None:
    whole = of(kind, range(6))
    merged = added(of(kind, range(0, 6, 2)), of(kind, range(1, 6, 2)))
    assert_equal_sums(merged, whole, rtol=1e-13)
    assert_equal_sums(added(of(kind, range(6)), zeros(kind)), whole)
    assert zeros(kind).is_empty and not whole.is_empty


@pytest.mark.parametrize("kind", statistics())
def test_saved_sums_are_resumed(kind: type[Statistic]) -> None:
    whole, begun, resumed = of(kind, range(6)), of(kind, range(3)), zeros(kind)
    resumed.load_state_dict({name: t.clone() for name, t in begun.state_dict().items()})
    for seed in range(3, 6):
        resumed.update(SEEN[kind.source](seed))
    assert_equal_sums(resumed, whole)


@pytest.mark.parametrize("kind", statistics())
def test_saved_sums_of_another_shape_are_refused(kind: type[Statistic]) -> None:
    saved = of(kind, [1]).state_dict()
    name = next(iter(saved))
    with pytest.raises(ValueError, match=name):
        zeros(kind).load_state_dict(saved | {name: saved[name][..., :-1]})
    with pytest.raises(ValueError, match=name):
        zeros(kind).load_state_dict(saved | {name: saved[name].to(torch.float16)})
    with pytest.raises(ValueError, match="the saved state"):
        zeros(kind).load_state_dict({"other": saved[name]})


@pytest.mark.parametrize("kind", statistics())
def test_every_sum_is_float64_or_a_count_and_does_not_grow(kind: type[Statistic]) -> None:
    few, many = of(kind, range(1)).state_dict(), of(kind, range(9)).state_dict()
    for name in few:
        assert few[name].dtype in (torch.float64, torch.int64)
        assert few[name].shape == many[name].shape
        assert few[name].numel() / SPACE.num_heads <= 4 * SPACE.head_dim**2


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
            total = zeros(kind)
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


def test_a_sample_has_the_chosen_rows_only() -> None:
    call = op_call(1, 30, rows=2)
    call.sampled = (torch.tensor([0, 7, 59]), torch.tensor([31]))
    total = QueryKeySample.zeros(SPACE)
    total.update(call)
    rows = torch.cat([call.q.flatten(0, 1)[[0, 7, 59]], call.k.flatten(0, 1)[[31]]]).double()
    torch.testing.assert_close(total.gram, torch.einsum("thi,thj->hij", rows, rows))
    assert int(total.rows) == 4


def test_of_a_token_with_several_keys_a_sample_has_all() -> None:
    call = op_call(1, 30)
    call.k, call.steps = torch.cat([call.k, 2 * call.k], 1), 2
    call.sampled = (torch.tensor([3]), torch.tensor([4]))
    total = QueryKeySample.zeros(SPACE)
    total.update(call)
    rows = torch.cat([call.q[0, [3]], call.k[0, [8, 9]]]).double()
    torch.testing.assert_close(total.gram, torch.einsum("thi,thj->hij", rows, rows))
    assert int(total.rows) == 3


@pytest.mark.parametrize(("sequences", "seq_len", "rows"), [(3, 10, 7), (40, 50, 12), (2, 3, 50)])
def test_a_row_sample_is_uniform_and_split_by_sequence(
    sequences: int, seq_len: int, rows: int
) -> None:
    sample = row_sample(sequences, seq_len, seed=1, rows=rows)
    found = [
        offset + n * seq_len + int(token)
        for n in range(sequences)
        for offset, tokens in zip((0, sequences * seq_len), sample.of_sequence(n), strict=True)
        for token in tokens
    ]
    assert sorted(found) == sample.chosen.tolist() and len(set(found)) == len(found)
    assert len(found) == min(rows, 2 * sequences * seq_len)
    assert torch.equal(row_sample(sequences, seq_len, 1, rows).chosen, sample.chosen)
    drawn = torch.cat([row_sample(sequences, seq_len, s, rows).chosen for s in range(300)])
    expected = len(drawn) / (2 * sequences * seq_len)
    counts = torch.bincount(drawn, minlength=2 * sequences * seq_len)
    assert float(((counts - expected) ** 2 / expected).sum()) <= 1.3 * len(counts)


def test_state_spectra_count_threshold_ranks_and_nuclear_norms() -> None:
    total = StateSpectra.zeros(HEADS)
    seen = [states(seed) for seed in range(4)]
    for some in seen:
        total.update(some)
    values = np.linalg.svd(torch.cat(seen).double().numpy(), compute_uv=False)
    # Two value heads to a key head: both count.
    of_heads = values.reshape(-1, 3, 2, 4).swapaxes(1, 2).reshape(-1, 3, 4)
    assert int(total.states) == len(of_heads)
    np.testing.assert_allclose(total.nuclear_norm, of_heads.sum((0, 2)))
    for epsilon in (10**-0.5, 0.1, 10**-0.21, 1e-4):
        above = of_heads > epsilon * of_heads[..., :1]
        np.testing.assert_allclose(total.threshold_rank(epsilon), above.sum(2).mean(0))
    assert total.dimension().tolist() == [4, 4, 4]


def test_states_of_zeros_have_no_rank_and_tiny_values_are_counted_together() -> None:
    total = StateSpectra.zeros(HEADS)
    total.update(torch.zeros(2, 3, 5, 4))
    assert total.threshold_rank(1e-12).tolist() == [0, 0, 0]
    total.update(torch.diag(torch.tensor([1.0, 1e-6, 1e-14, 0])).double().expand(1, 3, 4, 4))
    assert total.threshold_rank(1e-12).tolist() == [2 / 3] * 3
    with pytest.raises(ValueError, match="epsilon is 0.0: give at least 1e-12"):
        total.threshold_rank(0.0)


def test_products_are_those_of_whole_tensors_along_rows_and_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"v_proj.weight": (24, 10), "o_proj.weight": (10, 24)}
    weights, gradients = (
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(2)
    )
    layout = SharedHeads(6, 4)
    axes = (Axis("v_proj.weight", 0, layout), Axis("o_proj.weight", 1, layout))
    space = Space("layers.0.value", "value", 0, 1, 4, axes)
    total = WeightGradientProducts.zeros(space)
    for first in range(0, 24, 5):
        shards = {
            name: Shard(weights[name][first : first + 5], g[first : first + 5], first)
            for name, g in gradients.items()
            if first < len(g)
        }
        total.update(GradientShare(space, shards, 1))
    products = {name: (weights[name] * gradients[name]).double().abs() for name in weights}
    expected = products["v_proj.weight"].sum(1) + products["o_proj.weight"].sum(0)
    torch.testing.assert_close(total.products[0], expected.view(6, 4).sum(0), rtol=1e-5, atol=0.0)


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
    spaces = [s for s in adapter.spaces(model.config.to_dict()) if s.kind == "key"]
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
