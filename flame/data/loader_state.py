"""A loader's position as JSON: how it is written, and whether it fits the data."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict

from flame.data.packing import Cursor
from flame.errors import UserError
from flame.storage.shape import check_shape

FORMAT = 1
"""Format of a loader's state."""

MIXTURE = {"sources", "weights"}
"""Keys that only the state of several sources has."""

State = dict[str, Any]
Cursors = tuple[Cursor, ...]
"""The positions in one virtual shard, one for each source."""


class _Saved(TypedDict):
    next_sequence: int
    shards: dict[str, list[int] | list[list[int]]]


def written_cursors(cursors: Cursors) -> list[Any]:
    """Return a shard's cursors as JSON: numbers, or a list of such for several sources.

    They are epoch, document and token, and the block unless it is the first.
    """
    numbers = [list(dataclasses.astuple(cursor)) for cursor in cursors]
    numbers = [own if own[-1] else own[:-1] for own in numbers]
    return numbers if len(numbers) > 1 else numbers[0]


def read_cursors(numbers: list[Any]) -> Cursors:
    """Return a shard's cursors from what `written_cursors` gave."""
    several = isinstance(numbers[0], list)
    return tuple(Cursor(*own) for own in (numbers if several else [numbers]))


def check_state(state: Mapping[str, Any], expected: State) -> None:
    """Raise `UserError` unless a saved position is whole, and of the data that `expected` says."""
    if state.get("format") != FORMAT:
        raise UserError(
            f"the data position has format {state.get('format')!r}, this version reads {FORMAT}: "
            "resume with the version that saved it"
        )
    try:
        check_shape(dict(state), _Saved)
        for shard, numbers in state["shards"].items():
            _check_cursors(shard, numbers)
    except ValueError as error:
        raise UserError(f"the data position is damaged: {error}; use another step") from error
    for key in [*expected, *sorted(MIXTURE & state.keys() - expected.keys())]:
        value = expected.get(key)
        if state.get(key) != value:
            if key == "layout":
                raise _other_files(state)
            name = "the number of documents" if key == "documents" else f"data.{key}"
            raise UserError(
                f"cannot resume: {name} is {value}, and was {state.get(key)} when the run was saved"
            )
    if "layout" in state and "layout" not in expected:
        raise UserError(
            "cannot resume: data.streaming was true when the run was saved, set it again"
        )
    missing = [s for s in range(expected["virtual_shards"]) if str(s) not in state["shards"]]
    if missing:
        raise UserError(f"the data position lacks virtual shard {missing[0]}: merge all ranks'")


def _other_files(state: Mapping[str, Any]) -> UserError:
    if "layout" in state:
        return UserError(
            "cannot resume: the files of data.dataset, or their parts, are not those of the run: "
            "give the same files, or start anew from its last step (--init)"
        )
    return UserError(
        "cannot resume: the data position is of a version that read streams in another order, or "
        "without data.streaming: resume with that, or start anew from the run's last step (--init)"
    )


def _check_cursors(shard: str, numbers: list[Any]) -> None:
    nested = bool(numbers) and isinstance(numbers[0], list)
    for own in numbers if nested else [numbers]:
        if len(own) not in (3, 4) or min(own) < 0 or max(own) >= 2**62:
            raise ValueError(f"shards.{shard} is no position")
