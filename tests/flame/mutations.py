"""Damage to files that keeps their structure, or not."""

import copy
import json
import random
from typing import Any

STRANGE: list[Any] = [
    None, True, -1, 0, 2**31, 2**32 - 1, 2**63, 10**400, 1e308, float("nan"), float("inf"), "",
    "x" * 100_000, "\ud800", "../../x", "\x00", [], {}, [[]], {"": {}}, [None] * 1000,
    "(a+)+$", "(",
]  # fmt: skip

TOML_VALUES = [
    "-1", "0", "9223372036854775807", "9" * 400, "9" * 6000, "1e308", "-0.5", "nan", "inf", '""',
    '"' + "x" * 100_000 + '"', '"../../x"', '"\\u0000"', "[]", "{}", "[[]]", "[1, 'a']", "true",
    "{a = {b = 1}}", "1979-05-27T07:32:00Z", '["' + "q" * 400 + '"]', '"(a+)+$"', "[nan]",
]  # fmt: skip
"""Values of every type that TOML has, as it writes them."""


def damaged(value: Any, draw: random.Random) -> bytes:
    """A JSON value with one to three changes somewhere in it, or in its bytes."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 2, 3])):
        value = _changed(value, draw)
    content = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    return damaged_bytes(content, draw) if draw.random() < 0.15 else content


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes that are cut, flipped, doubled or put in."""
    at = draw.randrange(len(content) + 1)
    return draw.choice([
        content[:at],
        content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
        content[:at] + draw.randbytes(8) + content[at:],
        content[:at] + content,
        content[:at] + b"[" * draw.choice([80, 2000, 100_000]) + content[at:],
        content[:at] + b'{"a":' * draw.choice([80, 2000, 100_000]) + content[at:],
    ])  # fmt: skip


def damaged_text(text: str, draw: random.Random) -> bytes:
    """Lines of TOML with values, keys or lines that do not belong there."""
    lines = text.splitlines()
    for _ in range(draw.choice([1, 1, 2, 3])):
        at = draw.randrange(len(lines))
        key, _, value = lines[at].partition("=")
        if draw.random() < 0.75:
            lines[at] = f"{key}= {draw.choice(TOML_VALUES)}" if value else lines[at]
            continue
        lines[at] = draw.choice([
            f"{key}.a = {value or 1}",
            f"{key}= " + "[" * draw.choice([3, 40, 5000]),
            f"{'a.' * draw.choice([40, 20_000])}b = 1",
            "[" + "a." * 40 + "b]",
            f"{key}x= {value}",
            f"{lines[at]}\n{lines[at]}",
            "[job]",
        ])  # fmt: skip
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return damaged_bytes(content, draw) if draw.random() < 0.1 else content


def _changed(value: Any, draw: random.Random) -> Any:
    """The value with a change at a place that is drawn on the way down."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.08:
            del value[key]
        elif kind < 0.14:
            value[f"{key}x"] = value.pop(key)
        else:
            value[key] = _changed(value[key], draw)
        return value
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value * 50
        value[at] = _changed(value[at], draw)
        return value
    if draw.random() < 0.1:
        for _ in range(draw.choice([70, 500])):
            value = draw.choice([[value], {"type": value}])
        return value
    return copy.deepcopy(draw.choice(STRANGE))
