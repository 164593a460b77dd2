"""Layouts, positions and the checks of selections."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pruning.layouts import Blocks, HeadMajor, Layout, SharedHeads
from pruning.spaces import Axis, Kept, Space, check_kept, dropped_positions, positions, rows


@dataclass(frozen=True)
class HouseholderBlocks:
    """Row n * H * d + h * d + c for each of `blocks` products: a channel is in every block."""

    blocks: int
    num_heads: int
    head_dim: int

    @property
    def size(self) -> int:
        return self.blocks * self.num_heads * self.head_dim

    def table(self) -> Tensor:
        grid = torch.arange(self.size).view(self.blocks, self.num_heads, self.head_dim)
        return grid.permute(1, 2, 0)


@dataclass(frozen=True)
class InterleavedKeys:
    """Per head [q d, k d, other m]: q and k rows belong to the space, the others to nobody."""

    num_heads: int
    head_dim: int
    other: int

    @property
    def size(self) -> int:
        return self.num_heads * (2 * self.head_dim + self.other)

    def table(self) -> Tensor:
        rows = torch.arange(self.size).view(self.num_heads, -1)[:, : 2 * self.head_dim]
        return rows.view(self.num_heads, 2, self.head_dim).transpose(1, 2)


def kept_of(*rows: list[int]) -> Kept:
    return tuple(torch.tensor(row, dtype=torch.int64) for row in rows)


KEPT = kept_of([0, 2], [1, 3])
RAGGED = kept_of([0, 2, 3], [1])


@pytest.mark.parametrize(
    ("layout", "kept", "expected"),
    [
        (HeadMajor(2, 4), KEPT, [0, 2, 5, 7]),
        (HouseholderBlocks(2, 2, 4), KEPT, [0, 2, 5, 7, 8, 10, 13, 15]),
        (InterleavedKeys(2, 4, 1), KEPT, [0, 2, 4, 6, 8, 10, 12, 14, 16, 17]),
        (SharedHeads(3, 4), kept_of([1, 2]), [1, 2, 5, 6, 9, 10]),
        (Blocks(4, 3), kept_of([0, 2]), [0, 1, 2, 6, 7, 8]),
        (HeadMajor(2, 4), RAGGED, [0, 2, 3, 5]),
        (HouseholderBlocks(2, 2, 4), RAGGED, [0, 2, 3, 5, 8, 10, 11, 13]),
    ],
)
def test_surviving_positions_by_layout(layout: Layout, kept: Kept, expected: list[int]) -> None:
    axis = Axis("weight", 0, layout)
    assert positions(axis, kept).tolist() == expected
    gone = dropped_positions(axis, kept).tolist()
    assert sorted(gone + expected) == list(range(layout.size)) and gone == sorted(gone)


def test_slicing_equals_selecting_in_each_head() -> None:
    weight = torch.randn(2 * 4, 3)
    sliced = weight[positions(Axis("weight", 0, HeadMajor(2, 4)), KEPT)]
    by_head = torch.stack([weight.view(2, 4, 3)[h, KEPT[h]] for h in range(2)])
    assert torch.equal(sliced, by_head.flatten(0, 1))


def test_keeping_everything_keeps_every_position() -> None:
    everything = rows(torch.arange(4).repeat(2, 1))
    assert positions(Axis("weight", 0, HeadMajor(2, 4)), everything).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (KEPT[:1], "kept channels of 1 heads, expected 2"),
        ((KEPT[0], KEPT[1].int()), r"head 1: kept channels are torch.int32 of shape \[2\]"),
        ((KEPT[0], KEPT[1][None]), r"of shape \[1, 2\], expected int64 of shape \[k\]"),
        (kept_of([0], []), "cannot keep 0 of 4 key channels of layers.0.key, head 1"),
        (kept_of([0], [0, 1, 2, 3, 4]), "cannot keep 5 of 4"),
        (kept_of([0, 4], [1, 2]), r"leave the range 0\.\.3"),
        (kept_of([-1, 2], [1, 2]), r"leave the range 0\.\.3"),
        (kept_of([2, 2], [1, 2]), "strictly increasing"),
        (kept_of([0, 1], [2, 1]), "strictly increasing"),
    ],
)
def test_what_is_no_selection_is_refused(kept: Kept, message: str) -> None:
    space = Space("layers.0.key", "key", 0, 2, 4, ())
    check_kept(space, KEPT)
    check_kept(space, RAGGED)
    with pytest.raises(ValueError, match=message):
        check_kept(space, kept)
