"""One threshold shares channels out: the total holds, no other shares would be worth more."""

import itertools

import pytest
import torch

from pruning.planning.allocation import groups, in_units_of_loss, shared_widths
from pruning.spaces import Space


def scores(heads: int = 3, dim: int = 6, spaces: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.key": torch.rand(heads, dim, generator=generator).double() ** 3 * (i + 1)
        for i in range(spaces)
    }


def worth(row: torch.Tensor, k: int) -> float:
    return float(row.sort(descending=True).values[:k].sum())


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_the_shares_are_the_best_of_all_with_their_total(seed: int, multiple: int) -> None:
    given = scores(seed=seed, heads=2)
    found = shared_widths(given, 8, multiple)
    flat = [k for of_space in found.values() for k in of_space]
    assert sum(flat) == 4 * 2 and all(k % multiple == 0 for k in flat)
    rows = [row for of_space in given.values() for row in of_space]
    sizes = range(multiple, 7, multiple)
    best = max(
        sum(worth(row, k) for row, k in zip(rows, shares, strict=True))
        for shares in itertools.product(sizes, repeat=4)
        if sum(shares) == 8
    )
    kept = sum(worth(row, k) for row, k in zip(rows, flat, strict=True))
    assert kept == pytest.approx(best, rel=1e-12)


def test_with_steps_of_one_channel_what_is_kept_lies_above_one_threshold() -> None:
    given = scores(heads=4, dim=16)
    found = shared_widths(given, 64, 1)
    kept, dropped = [], []
    for name, of_space in given.items():
        for row, k in zip(of_space, found[name], strict=True):
            ordered = row.sort(descending=True).values
            kept += ordered[1:k].tolist()
            dropped += ordered[k:].tolist()
    assert min(kept) >= max(dropped)
    assert len(set(found["layers.0.key"] + found["layers.1.key"])) > 2


def test_every_head_keeps_one_step_and_none_more_than_it_has() -> None:
    given = {"layers.0.key": torch.tensor([[9.0] * 6, [1.0] * 6, [0.0] * 6]).double()}
    assert shared_widths(given, 6, 1) == {"layers.0.key": (4, 1, 1)}
    assert shared_widths(given, 6, 2) == {"layers.0.key": (2, 2, 2)}
    assert shared_widths(given, 12, 2) == {"layers.0.key": (6, 4, 2)}
    assert shared_widths(given, 6, 1, floor=2) == {"layers.0.key": (2, 2, 2)}
    assert shared_widths(given, 14, 2, floor=3) == {"layers.0.key": (6, 4, 4)}
    # 6 is no multiple of 4, so 4 is the most.
    assert shared_widths(given, 12, 4) == {"layers.0.key": (4, 4, 4)}


def test_ties_go_to_the_earlier_head() -> None:
    given = {name: torch.ones(2, 4).double() for name in ("layers.0.key", "layers.1.key")}
    assert shared_widths(given, 8, 1) == {"layers.0.key": (4, 2), "layers.1.key": (1, 1)}


def test_scores_that_are_not_finite_are_refused() -> None:
    given = scores()
    given["layers.1.key"][1, 2] = float("nan")
    with pytest.raises(ValueError, match="layers.1.key: the scores hold a NaN"):
        shared_widths(given, 8, 1)


def test_scores_in_units_of_loss_make_what_was_dropped_cost_what_was_measured() -> None:
    given = scores(heads=2, dim=6)
    damage = {"layers.0.key": 0.5, "layers.1.key": 0.25}
    found = in_units_of_loss(given, 4, damage)
    for name, of_space in found.items():
        assert torch.allclose(of_space / given[name], of_space[0, 0] / given[name][0, 0])
        lowest = of_space.sort().values[:, :2]
        assert float(lowest.sum()) == pytest.approx(damage[name], rel=1e-12)
    nothing = {"layers.0.key": torch.zeros(1, 4).double()}
    assert in_units_of_loss(nothing, 2, damage)["layers.0.key"].tolist() == [[0.0] * 4]


def test_layers_and_kinds_do_not_share_unless_asked() -> None:
    spaces = [
        Space(f"layers.{layer}.{kind}", kind, layer, 2, 4, ())
        for layer in (0, 2)
        for kind in ("key", "head")
    ]
    names = [[space.name for space in group] for group in groups(spaces, "model")]
    assert names == [["layers.0.key", "layers.2.key"], ["layers.0.head", "layers.2.head"]]
    assert [len(group) for group in groups(spaces, "layer")] == [1, 1, 1, 1]
