"""Checking the data position that a step holds, which may be a stranger's file."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from flame.data.packing import Cursor
from flame.errors import UserError

SHORTEST = 3
"""Numbers that every cursor has: epoch, document and token."""


def check_position(state: Mapping[str, Any], sizes: Sequence[int | None], num_shards: int) -> None:
    """Raise UserError unless `state` has a next sequence, and a cursor for each shard and source.

    Args:
        state: the content of `dataloader.json`, merged.
        sizes: the number of documents of each source, None if it is not known.
        num_shards: the virtual shards that they are dealt to.
    """
    shards = state.get("shards")
    if not _is_count(state.get("next_sequence")) or not isinstance(shards, Mapping):
        raise _damaged("next_sequence or shards")
    most = [2**62 if size is None else -(-size // num_shards) for size in sizes]
    for shard, cursors in shards.items():
        several = cursors if len(sizes) > 1 else [cursors]
        if not isinstance(several, list) or len(several) != len(sizes):
            raise _damaged(f"shards.{shard}")
        if not all(map(_is_cursor, several, most)):
            raise _damaged(f"shards.{shard}")


def _is_cursor(value: Any, documents: int) -> bool:
    """Whether `value` is a cursor in a shard of at most so many documents."""
    return (
        isinstance(value, list)
        and SHORTEST <= len(value) <= len(fields(Cursor))
        and all(map(_is_count, value))
        and value[1] <= documents
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _damaged(where: str) -> UserError:
    return UserError(f"the data position (dataloader.json) is damaged at {where}: use another step")
