"""Indices of steps: what DCP writes is read; what is hostile, malformed or has gaps is refused."""

import dataclasses
import itertools
import pathlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from flame.errors import UserError
from flame.unpickling.index import load_index
from tests.flame.unpickling.memory import peak_memory

PATH = Path("step-1/.metadata")
MEBIBYTE = 2**20


def _index(tmp_path: Path) -> bytes:
    """The index of a step with a model, moments, lists and values, as DCP writes it."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        **model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "list": [1, {"a": torch.ones(2)}],
        "tuple": (1, 2),
        "dataloader": {"dp_rank_0": b"abc"},
    }
    dcp.save(state, checkpoint_id=tmp_path / "step", no_dist=True)
    return (tmp_path / "step" / ".metadata").read_bytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_dcp_writes_is_read(tmp_path: Path, protocol: int) -> None:
    content = _index(tmp_path)
    expected = pickle.loads(content)
    expected.storage_meta.checkpoint_id = str(expected.storage_meta.checkpoint_id)
    found = load_index(pickle.dumps(pickle.loads(content), protocol), PATH)
    assert found == expected and load_index(content, PATH) == expected
    assert [k.index for k in found.storage_data] == [k.index for k in expected.storage_data]


# --- chunks -------------------------------------------------------------------------------------


def _with_chunks(shape: tuple[int, ...], chunks: list[tuple[tuple, tuple]], **info: Any) -> bytes:
    """An index with one tensor `w`, whose chunks are offsets and sizes."""
    stored = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
    places = {
        MetadataIndex("w", offset, position): _StorageInfo(
            **{"relative_path": "a.distcp", "offset": 4000 * position, "length": 4000, **info}
        )
        for position, (offset, _) in enumerate(chunks)
    }
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), stored)
    return pickle.dumps(Metadata({"w": entry}, {"w": ("w",)}, places))


GRID = [((r, c), (2, 3)) for r, c in itertools.product((0, 2, 4), (0, 3))]
PINWHEEL = [
    ((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((4, 3), [((0, 0), (4, 3))]),
        ((5, 3), [((0, 0), (3, 3)), ((3, 0), (2, 3)), ((5, 0), (0, 3)), ((5, 0), (0, 3))]),
        ((6, 6), GRID),
        ((3, 3), PINWHEEL),
        ((), [((), ())]),
        ((0, 4), [((0, 0), (0, 4))]),
    ],
    ids=["whole", "rows and empty shards", "grid", "pinwheel", "scalar", "empty"],
)
def test_chunks_that_tile_a_tensor_are_read(shape: tuple, chunks: list) -> None:
    index = load_index(_with_chunks(shape, chunks), PATH)
    assert index.state_dict_metadata["w"].size == shape


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((4, 2), [((0, 0), (2, 2)), ((1, 0), (2, 2))]),
        ((4, 2), [((0, 0), (2, 2))]),
        ((4, 2), []),
        ((4, 2), [((0, 0), (4, 2)), ((0, 0), (4, 2))]),
        ((6, 6), [*GRID[:-1], ((3, 3), (2, 3))]),
        ((4, 2), [((0, 0), (2, 2)), ((3, 0), (2, 2))]),
        ((4, 2), [((0, 0), (8,))]),
        ((), [((), ()), ((), ())]),
        ((2**40, 2**40), [((0, 0), (2**40, 2**40))]),
        ((2**62,), [((0,), (2**62,))]),
    ],
    ids=[
        "overlap and gap", "gap", "none", "twice", "grid", "beyond", "dimensions", "two scalars",
        "larger than stored", "huge",
    ],
)  # fmt: skip
def test_other_chunks_are_refused(shape: tuple, chunks: list) -> None:
    with pytest.raises(UserError, match=r"step-1/\.metadata is not a DCP index .*'w'"):
        load_index(_with_chunks(shape, chunks), PATH)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"relative_path": "../a"}, "no file of the step"),
        ({"relative_path": "/etc/passwd"}, "no file of the step"),
        ({"relative_path": "a\x1b[2J"}, "no file of the step"),
        ({"relative_path": 7}, "relative_path"),
        ({"offset": -1}, "negative"),
        ({"offset": "0"}, "offset of a _StorageInfo"),
        ({"offset": 0}, "share bytes"),
        ({"length": True}, "length of a _StorageInfo"),
        ({"length": 2.5}, "length of a _StorageInfo"),
        ({"length": 3}, "larger than what is stored"),
        ({"transform_descriptors": ("zstd",)}, "compressed"),
    ],
)
def test_places_are_checked(info: dict[str, Any], message: str) -> None:
    content = _with_chunks((6, 6), GRID, **info)
    with pytest.raises(UserError, match=message) as caught:
        load_index(content, PATH)
    assert str(caught.value).isprintable()


def _changed(change: Callable[[Any], Any]) -> bytes:
    index = pickle.loads(_with_chunks((6, 6), GRID))
    change(index)
    return pickle.dumps(index)


def _entry(index: Any) -> Any:
    return index.state_dict_metadata["w"]


INSIDES: dict[str, Callable[[Any], Any]] = {
    "size": lambda index: setattr(_entry(index), "size", [6, 6]),
    "negative size": lambda index: setattr(_entry(index), "size", torch.Size((-6, -6))),
    "chunks": lambda index: setattr(_entry(index), "chunks", 3),
    "a chunk": lambda index: _entry(index).chunks.append(None),
    "offsets": lambda index: setattr(_entry(index).chunks[0], "offsets", (0, 0)),
    "properties": lambda index: setattr(_entry(index), "properties", torch.float32),
    "dtype": lambda index: setattr(_entry(index).properties, "dtype", "float32"),
    "sparse": lambda index: setattr(_entry(index).properties, "layout", torch.sparse_coo),
    "entries": lambda index: setattr(index, "state_dict_metadata", [1]),
    "an entry": lambda index: index.state_dict_metadata.update(v=3),
    "a name": lambda index: index.state_dict_metadata.update({"a\nb": _entry(index)}),
    "no places": lambda index: setattr(index, "storage_data", None),
    "a place": lambda index: index.storage_data.update({MetadataIndex("v"): 3}),
    "a key": lambda index: index.storage_data.update({"v": _StorageInfo("a", 0, 1)}),
    "planner": lambda index: setattr(index, "planner_data", {"w": [1]}),
    "version": lambda index: setattr(index, "version", {}),
    "no attributes": lambda index: vars(index).clear(),
}


@pytest.mark.parametrize("inside", INSIDES)
def test_the_inside_is_checked(inside: str) -> None:
    with pytest.raises(UserError, match=r"step-1/\.metadata is not a DCP index") as caught:
        load_index(_changed(INSIDES[inside]), PATH)
    assert str(caught.value).isprintable()


# --- hostile pickles ----------------------------------------------------------------------------


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


_METADATA = "torch.distributed.checkpoint.metadata"
_BOMB = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(40))
HOSTILE = {
    "system": b"\x80\x02" + _global("os", "system") + b"\x8c\x04true\x85R.",
    "attributes of a class": (
        b"\x80\x04" + _global("pathlib", "PosixPath") + b"N}\x8c\x04name\x8c\x03../s\x86b."
    ),
    "state of a class": (
        b"\x80\x04" + _global(_METADATA, "ChunkStorageMetadata") + b"}\x8c\x04sizes\x8c\x01xsb."
    ),
    "nested tuples": b"\x80\x04)\x94" + _BOMB + b"}h\x28K\x01s.",
    "a tuple as a key": b"\x80\x04}K\x01K\x02\x86K\x01s.",
    "a frozen set": b"\x80\x04(K\x01\x91.",
    "memo index": b"\x80\x02}r" + struct.pack("<I", 2**27) + b".",
    "memo used before": b"\x80\x02j" + struct.pack("<I", 2**27) + b".",
    "a list in itself": b"\x80\x04]\x94h\x00a.",
    "deep": b"\x80\x04" + b"(" * 10**6 + b"t" * 10**6 + b".",
    "deep lists": b"\x80\x04" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
    "many lists": b"\x80\x04](" + b"]" * (4 * 10**6 - 9) + b"e.",
    "many dicts": b"\x80\x04](" + b"}K\x01K\x01s" * (5 * 10**5) + b"e.",
    "many strings": b"\x80\x04]("
    + b"".join(b"\x8c\x02%c%c\x94" % (33 + i // 90 % 90, 33 + i % 90) for i in range(8 * 10**5))
    + b"e.",
    "many numbers": b"\x80\x04](" + b"J\x01\x02\x03\x04\x94" * (6 * 10**5) + b"e.",
    "a string longer than the file": b"\x80\x04X" + struct.pack("<I", 2**31) + b"ab.",
    "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
    "a long integer": b"\x80\x04\x8b" + struct.pack("<I", 10**6) + b"\x01" * 10**6 + b".",
    "half a character": b"\x80\x04\x8c\x03\xed\xa0\x80.",
    "nothing": b"",
    "no end": b"\x80\x04]",
    "an extension": b"\x80\x04\x82\x01.",
    "a persistent id": b"\x80\x04K\x01Q.",
    "a terminal's escape": b"\x80\x04\x8c\x05\x1b[31m\x8c\x01x\x93.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_in_little_memory(name: str) -> None:
    def refuse() -> None:
        with pytest.raises(UserError) as caught:
            load_index(HOSTILE[name], PATH)
        assert str(caught.value).startswith("step-1/.metadata") and len(str(caught.value)) < 400
        assert str(caught.value).isprintable()

    assert peak_memory(refuse) < 256 * MEBIBYTE
    assert isinstance(vars(pathlib.PurePath)["name"], property)
    assert dataclasses.is_dataclass(ChunkStorageMetadata)
    assert not hasattr(ChunkStorageMetadata, "sizes")
