"""Ways to change a step or a safetensors folder that know how it is built.

Values of an index, opcodes of a pickle, fields of a zip and of a header are changed, and now and
then plain bytes. Hashes are then made to fit, as a hostile hand would.
"""

import copy
import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flame.storage.checksums import CHECKSUMS, METADATA
from tests.flame.damage import rewrite

NASTY: list[Any] = [
    -1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**80, -(2**70), None, True, 1.5, float("nan"), "", "..",
    "/etc/passwd", "a\nb", "\x1b[31m", "x" * 5000, b"bytes", [], {}, (), (1, (2, (3,))), {1, 2},
    torch.Size([3, 4]), torch.Size([2**40, 2**40]), torch.float64, torch.strided, print,
    Path("/tmp"), [[[[]]]], {"a": {"b": 1}},
]  # fmt: skip
"""Values to put in the place of others."""


def change_step(step: Path, draw: random.Random) -> None:
    """Change one file of a step by one of the ways below."""
    hashed = (step / CHECKSUMS).exists()
    way = draw.choice([_index_values, _index_pickle, _index_pickle, _archive, _archive, _checksums])
    if way is _checksums and hashed:
        path = step / CHECKSUMS
        path.write_text(_text(_json_values(json.loads(path.read_text()), draw), draw))
        return
    if way in (_index_values, _index_pickle, _checksums):
        name, data = (
            METADATA,
            (_index_values if way is _checksums else way)((step / METADATA).read_bytes(), draw),
        )
    else:
        name = draw.choice(sorted(path.name for path in step.glob("*.distcp")))
        data = _archive((step / name).read_bytes(), draw)
    if hashed and draw.random() < 0.9:
        rewrite(step, name, data)
    else:
        (step / name).write_bytes(data)


def change_safetensors(folder: Path, draw: random.Random) -> None:
    """Change the header of a safetensors file, or bytes of the file."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if draw.random() < 0.2:
        path.write_bytes(_bytes(data, draw))
        return
    text = _text(_json_values(json.loads(data[8 : 8 + length]), draw), draw).encode()
    said = draw.choice([len(text), len(text), len(text), draw.choice([0, 2**31, 2**63, length])])
    path.write_bytes(struct.pack("<Q", said) + text + data[8 + length :])


def _checksums(data: bytes, draw: random.Random) -> bytes:
    raise AssertionError("stands for a change of the checksums")


def _index_values(data: bytes, draw: random.Random) -> bytes:
    """Change attributes, items and keys anywhere inside the index."""
    index = pickle.loads(data)
    for _ in range(draw.randint(1, 3)):
        if not vars(index):
            break
        holder, key = _random_place(index, draw)
        _put(
            holder,
            key,
            draw.choice([*copy.deepcopy(NASTY), _other_value(index, draw), _REMOVE, _TWICE]),
        )
    try:
        return pickle.dumps(index, draw.choice([0, 1, 2, 4, 4, 4, 5]))
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError, LookupError):
        return pickle.dumps(None)


_REMOVE, _TWICE = object(), object()


def _random_place(value: Any, draw: random.Random) -> tuple[Any, Any]:
    """A container or object inside `value`, and one of its keys, indices or attributes."""
    while True:
        inner = _keys(value)
        key = draw.choice(inner)
        child = _get(value, key)
        if not _keys(child) or draw.random() < 0.15:
            return value, key
        value = child


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    if isinstance(value, list):
        return list(range(len(value)))
    return list(getattr(value, "__dict__", {}))


def _get(value: Any, key: Any) -> Any:
    return value[key] if isinstance(value, dict | list) else value.__dict__[key]


def _put(holder: Any, key: Any, value: Any) -> None:
    target = holder if isinstance(holder, dict | list) else holder.__dict__
    if value is _REMOVE:
        del target[key]
    elif value is _TWICE and isinstance(target, list):
        target.append(target[key])
    elif value is _TWICE:
        target[f"{key}x"] = target[key]
    else:
        target[key] = value


def _other_value(index: Any, draw: random.Random) -> Any:
    return _get(*_random_place(index, draw))


def _index_pickle(data: bytes, draw: random.Random) -> bytes:
    return _pickle(data, draw) if draw.random() < 0.8 else _bytes(data, draw)


def _pickle(data: bytes, draw: random.Random) -> bytes:
    """Remove, repeat, swap and insert opcodes of a pickle, and change their arguments."""
    stops = [position or 0 for _, _, position in pickletools.genops(data)] + [len(data)]
    parts = [data[a:b] for a, b in zip(stops, stops[1:], strict=False)]
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(parts))
        way = draw.randrange(6)
        if way == 0:
            del parts[at]
        elif way == 1:
            parts[at:at] = [parts[at]] * draw.choice([1, 2, 1000, 100_000])
        elif way == 2:
            other = draw.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif way == 3:
            parts.insert(at, _opcode(draw))
        elif way == 4:
            first = draw.randrange(len(parts))
            parts[at:at] = parts[first : first + draw.randint(1, 40)]
        else:
            parts[at] = parts[at][:1] + draw.randbytes(len(parts[at]) - 1)
        if not parts:
            break
    return b"".join(parts)


def _opcode(draw: random.Random) -> bytes:
    """Any opcode of any protocol, with an argument that may be too long or too large."""
    code = draw.choice(pickletools.opcodes).code.encode("latin-1")
    named = b"cos\nsystem\n\x8c\x02id\x85R"
    return draw.choice([
        code, code + draw.randbytes(4), code + b"\xff" * 8, code + b"3\n", named,
        b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"(" * 2000, b"]" * 5000, b"\x86\x94" * 50,
    ])  # fmt: skip


def _archive(data: bytes, draw: random.Random) -> bytes:
    """Change one archive in a file, keeping its length so that the others stay in place."""
    starts = [at for at in _positions(data, b"PK\x03\x04") if b"data.pkl" in data[at : at + 120]]
    ends = [*starts[1:], len(data)]
    at = draw.randrange(len(starts))
    begin, end = starts[at], ends[at]
    piece, way = data[begin:end], draw.randrange(4)
    changed = (_zip_fields if way < 2 else _inner_pickle if way == 2 else _recompressed)(
        piece, draw
    )
    return data[:begin] + changed[: end - begin].ljust(end - begin, b"\0") + data[end:]


def _positions(data: bytes, what: bytes) -> list[int]:
    found, at = [], data.find(what)
    while at >= 0:
        found.append(at)
        at = data.find(what, at + 1)
    return found


def _zip_fields(data: bytes, draw: random.Random) -> bytes:
    """Overwrite fields of the zip's headers and directory."""
    changed = bytearray(data)
    places = [
        p for mark in (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6") for p in _positions(data, mark)
    ]
    for _ in range(draw.randint(1, 3)):
        at = draw.choice(places) + draw.randint(4, 46)
        size = draw.choice([1, 2, 4, 8])
        value = draw.choice([b"\0" * 8, b"\xff" * 8, b"\1" + b"\0" * 7, draw.randbytes(8)])
        changed[at : at + size] = value[:size]
    return bytes(changed)


def _inner_pickle(data: bytes, draw: random.Random) -> bytes:
    """Change the pickle of an archive in place."""
    begin = data.index(b"\x80\x02")
    end = next(p + 1 for o, _, p in pickletools.genops(data[begin:]) if o.name == "STOP" and p)
    changed = _pickle(data[begin : begin + end], draw)[:end].ljust(end, b".")
    return data[:begin] + changed + data[begin + end :]


def _recompressed(data: bytes, draw: random.Random) -> bytes:
    """The archive written anew: compressed, with an entry that inflates, renamed or repeated."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        victim = draw.choice(old.namelist())
        for name in old.namelist():
            content, how = old.read(name), zipfile.ZIP_STORED
            if name == victim:
                how = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
                content = draw.choice([content, b"", bytes(2**22), content * 3])
                name = draw.choice([name, name, "x", "archive/data/9", "../../x"])
            new.writestr(name, content, how)
    return stream.getvalue()


def _bytes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 20)):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    cut = draw.randrange(len(data) + 1)
    return bytes(draw.choice([changed, changed, changed[:cut], changed + changed[:cut]]))


def _json_values(content: Any, draw: random.Random) -> Any:
    for _ in range(draw.randint(1, 3)):
        if not content:
            break
        holder, key = _random_place(content, draw)
        values = [value for value in copy.deepcopy(NASTY) if _is_json(value)]
        _put(holder, key, draw.choice([*values, _REMOVE, _TWICE, [0] * 20_000]))
    return content


def _is_json(value: Any) -> bool:
    return isinstance(value, int | float | str | list | dict | None)


def _text(content: Any, draw: random.Random) -> str:
    """JSON text, sometimes with a piece that the library would not write."""
    text = json.dumps(content)
    extra = draw.choice(["", "", "", "[" * 100_000, '{"a":1,"a":2}', "\\ud800", "1e999", "}"])
    at = draw.randrange(len(text) + 1)
    return text[:at] + extra + text[at:]


WAYS: dict[str, Callable[[Path, random.Random], None]] = {
    "ours": lambda model, draw: change_step(model / "checkpoint" / "step-3", draw),
    "foreign": lambda model, draw: change_step(model / "checkpoint" / "step-2", draw),
    "safetensors": change_safetensors,
}
"""What is changed, by the form of the model."""
