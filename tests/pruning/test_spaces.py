"""Layouts, positions and the checks of selections."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pruning.spaces import Axis, HeadMajor, Layout, Space, check_kept, dropped_positions, positions


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


@dataclass(frozen=True)
class SharedByHeads:
    """One row of value channels; channel c lies at c in every head."""

    num_heads: int
    head_dim: int

    @property
    def size(self) -> int:
        return self.num_heads * self.head_dim

    def table(self) -> Tensor:
        return torch.arange(self.size).view(self.num_heads, self.head_dim).T[None]


KEPT = torch.tensor([[0, 2], [1, 3]])


@pytest.mark.parametrize(
    ("layout", "kept", "expected"),
    [
        (HeadMajor(2, 4), KEPT, [0, 2, 5, 7]),
        (HouseholderBlocks(2, 2, 4), KEPT, [0, 2, 5, 7, 8, 10, 13, 15]),
        (InterleavedKeys(2, 4, 1), KEPT, [0, 2, 4, 6, 8, 10, 12, 14, 16, 17]),
        (SharedByHeads(3, 4), torch.tensor([[1, 2]]), [1, 2, 5, 6, 9, 10]),
    ],
)
def test_surviving_positions_by_layout(layout: Layout, kept: Tensor, expected: list[int]) -> None:
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
    everything = torch.arange(4).repeat(2, 1)
    assert positions(Axis("weight", 0, HeadMajor(2, 4)), everything).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.tensor([[0, 1]]), r"shape \[1, 2\], expected int64 of shape \[2, k\]"),
        (KEPT.int(), "int32"),
        (KEPT[:, :0], "cannot keep 0 of 4 key channels of layers.0.key"),
        (torch.arange(5).repeat(2, 1), "cannot keep 5 of 4"),
        (torch.tensor([[0, 4], [1, 2]]), r"leave the range 0\.\.3"),
        (torch.tensor([[-1, 2], [1, 2]]), r"leave the range 0\.\.3"),
        (torch.tensor([[2, 2], [1, 2]]), "strictly increasing"),
        (torch.tensor([[0, 1], [2, 1]]), "strictly increasing"),
    ],
)
def test_what_is_no_selection_is_refused(kept: Tensor, message: str) -> None:
    space = Space("layers.0.key", "key", 0, 2, 4, ())
    check_kept(space, KEPT)
    with pytest.raises(ValueError, match=message):
        check_kept(space, kept)
