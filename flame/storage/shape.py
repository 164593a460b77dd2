"""What a file of JSON or TOML must hold, as a `TypedDict` or dataclass; what differs is named."""

import dataclasses
import math
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

NAMES = {
    dict: "a table",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}


def check_shape(value: Any, shape: Any, name: str = "") -> None:
    """Raise ValueError, which names the place, unless a parsed value has the type `shape`.

    `bool` is not an `int`, an `int` is a `float`, and a `float` must be finite. Keys that
    `shape` does not list may hold anything.

    Args:
        value: what a parser of JSON or TOML returned.
        shape: `Any`, one of the types in `NAMES`, a `TypedDict`, a dataclass (whose fields without
            a default are required keys), or these in `dict[str, …]`, `list[…]` and unions; or a
            `Literal`.
        name: where the value stands, for the message.
    """
    origin, arguments = get_origin(shape), get_args(shape)
    if shape is Any:
        return
    if origin is Literal:
        if not any(type(value) is type(known) and value == known for known in arguments):
            raise ValueError(f"{name} is {_said(value)}, not {_expected(shape)}")
    elif origin in (Union, UnionType):
        _check_union(value, shape, name)
    elif _has_keys(shape):
        _check_keys(value, shape, name)
    elif not _is(value, origin or shape):
        raise ValueError(f"{name or 'it'} is {_said(value)}, not {_expected(shape)}")
    elif origin is dict:
        for key, item in value.items():
            check_shape(item, arguments[1], _inside(name, key))
    elif origin is list:
        for number, item in enumerate(value):
            check_shape(item, arguments[0], f"{name}[{number}]")


def _check_union(value: Any, shape: Any, name: str) -> None:
    fitting = [one for one in get_args(shape) if _is(value, _plain(one))]
    if not fitting:
        raise ValueError(f"{name or 'it'} is {_said(value)}, not {_expected(shape)}")
    for one in fitting[:-1]:
        with suppress(ValueError):
            return check_shape(value, one, name)
    check_shape(value, fitting[-1], name)


def _check_keys(value: Any, shape: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name or 'it'} is {_said(value)}, not a table")
    for key, hint in get_type_hints(shape).items():
        if key in value:
            check_shape(value[key], hint, _inside(name, key))
        elif key in _required(shape):
            raise ValueError(f"{_inside(name, key)} is missing")


def _has_keys(shape: Any) -> bool:
    return is_typeddict(shape) or dataclasses.is_dataclass(shape)


def _required(shape: Any) -> frozenset[str]:
    if is_typeddict(shape):
        return shape.__required_keys__
    unset = dataclasses.MISSING
    fields = dataclasses.fields(shape)
    return frozenset(f.name for f in fields if f.default is unset and f.default_factory is unset)


def _plain(shape: Any) -> Any:
    return dict if _has_keys(shape) else get_origin(shape) or shape


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and _is_finite(value)
    if kind is Any:
        return True
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _inside(name: str, key: str) -> str:
    shown = key if len(key) <= 40 else f"{key[:40]}…"
    return f"{name}.{shown}" if name else shown


def _said(value: Any) -> str:
    """Return a short value as it is written, and the kind of a longer one."""
    if isinstance(value, (dict, list)):
        return NAMES[type(value)]
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 40 else f"{text[:40]}…"


def _expected(shape: Any) -> str:
    arguments = get_args(shape)
    if get_origin(shape) is Literal:
        return " or ".join(map(repr, arguments))
    if get_origin(shape) in (Union, UnionType):
        return " or ".join(map(_expected, arguments))
    return NAMES.get(_plain(shape), str(shape))
