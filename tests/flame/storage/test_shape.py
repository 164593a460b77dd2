"""The check of a parsed file against the keys and types that it must have."""

from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from flame.storage.shape import check_shape


class Inner(TypedDict):
    size: int


class File(TypedDict):
    kind: Literal["a", "b"]
    sizes: dict[str, list[int]]
    share: float
    inner: Inner | None
    free: NotRequired[Any]
    on: NotRequired[bool]
    rows: NotRequired[list[int] | list[list[int]]]


@dataclass
class Record:
    name: str
    count: int = 0


RIGHT = {"kind": "a", "sizes": {"x": [1]}, "share": 1, "inner": {"size": 2, "more": 0}}


def test_what_fits_passes() -> None:
    check_shape(RIGHT, File)
    check_shape({**RIGHT, "inner": None, "free": [1], "on": True, "unknown": 1}, File)
    check_shape({"name": "n"}, Record)
    check_shape({**RIGHT, "rows": [1]}, File)
    check_shape({**RIGHT, "rows": [[1], []]}, File)


@pytest.mark.parametrize(
    "change, place",
    [
        ({"kind": "c"}, "kind is 'c'"),
        ({"kind": []}, "kind is a list"),
        ({"sizes": []}, "sizes is a list"),
        ({"sizes": {"x": [1, True]}}, r"sizes.x\[1\] is True"),
        ({"sizes": {"x": [1.0]}}, r"sizes.x\[0\] is 1.0"),
        ({"share": float("inf")}, "share is inf"),
        ({"share": 10**400}, "share is a huge number"),
        ({"share": True}, "share is True"),
        ({"inner": {"size": None}}, "inner.size is None"),
        ({"inner": 1}, "inner is 1"),
        ({"inner": {}}, "inner.size is missing"),
        ({"on": 1}, "on is 1"),
        ({"rows": [[1], 2]}, r"rows\[1\] is 2"),
    ],
)
def test_the_place_that_differs_is_named(change: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=place):
        check_shape({**RIGHT, **change}, File)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match="kind is missing"):
        check_shape({}, File)
    with pytest.raises(ValueError, match="name is missing"):
        check_shape({}, Record)
    with pytest.raises(ValueError, match="it is a list"):
        check_shape([], File)
