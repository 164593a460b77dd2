"""Items dealt to ranks: each counts once, in order, and all ranks have as many turns."""

import pytest

from flame.process.dealing import batched, turns
from tests.distributed import run_distributed


def dealt(count: int) -> list[tuple[int, int, int, bool]]:
    found = turns(f"item {n}" for n in range(count))
    return [(t.first, t.number, int(t.item.split()[1]), t.counts) for t in found]


@pytest.mark.parametrize("count", [0, 1, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_item_counts_once_and_ranks_have_as_many_turns(size: int, count: int) -> None:
    ranks = run_distributed(dealt, size, count)
    assert {len(own) for own in ranks} == {-(-count // size)}
    counted = [item for own in ranks for _, _, item, counts in own if counts]
    assert sorted(counted) == list(range(count))
    for rank, own in enumerate(ranks):
        for turn, (first, number, item, counts) in enumerate(own):
            assert (first, number) == (turn * size, turn * size + rank)
            assert item == (number if counts else first)


def test_batches_are_as_long_as_asked_and_the_last_has_the_rest() -> None:
    assert list(batched("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batched("", 2)) == []
