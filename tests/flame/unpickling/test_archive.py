"""Values that `torch.save` wrote: read as data, in place where they are one block, or refused."""

import functools
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.storage.input_file import read_into
from flame.unpickling.archive import ARCHIVE_ERRORS, load, locate
from tests.flame.unpickling.memory import peak_memory

PLAIN = {
    "matrix": torch.arange(12.0).view(3, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.ones(0, 4),
    "half": torch.randn(2, 3, 4).bfloat16(),
    "rows of a larger one": torch.arange(30).view(5, 6)[2:4],
    "bool": torch.tensor([True, False]),
}
OTHER = {
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "columns of a larger one": torch.arange(12.0).view(3, 4)[:, 1:3],
    "expanded": torch.ones(1).expand(1),
    "eight bits": torch.ones(3).to(torch.float8_e4m3fn),
    "scheduler": {"base_lrs": [0.1, 0.2], "last": 3, "none": [None, True], "betas": (0.9, 0.999)},
    "nested": [[1, [2.5]], {"a": {"b": -(2**40)}}, "é", (), (1, 2, 3, 4), torch.float16],
    "tensors": [torch.ones(2), {"x": torch.zeros(0)}, torch.tensor(1)],
}
REFUSED = {
    "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    "function": print,
    "set": {1, 2},
    "bytes": b"abc",
    "storage": torch.ones(2).untyped_storage(),
    "too deep": functools.reduce(lambda inner, _: [inner], range(100), []),
}


def _archive(folder: Path, value: Any) -> tuple[Path, int, int]:
    """A file with what `torch.save` writes between other bytes; where it starts, its length."""
    path = folder / "file"
    with open(path, "wb") as stream:
        stream.write(b"x" * 77)
        torch.save(value, stream)
        stop = stream.tell()
        stream.write(b"y" * 5)
    return path, 77, stop - 77


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tensors_are_read_in_place(tmp_path: Path, name: str) -> None:
    path, start, length = _archive(tmp_path, PLAIN[name])
    with open(path, "rb") as stream:
        place = locate(stream.fileno(), start, length)
        assert place is not None
        found = torch.empty(place.shape, dtype=place.dtype)
        read_into(stream.fileno(), path, place.offset, found)
    assert torch.equal(found, PLAIN[name]) and found.dtype == PLAIN[name].dtype


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.float(), other.float())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_plain_data_is_what_torch_loads(tmp_path: Path, name: str) -> None:
    path, start, length = _archive(tmp_path, {**PLAIN, **OTHER}[name])
    (tmp_path / "alone").write_bytes(path.read_bytes()[start : start + length])
    with open(path, "rb") as stream:
        found = load(stream.fileno(), path, start, length)
    assert _same(found, torch.load(tmp_path / "alone", weights_only=True))


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_block_is_not_located(tmp_path: Path, name: str) -> None:
    path, start, length = _archive(tmp_path, OTHER[name])
    with open(path, "rb") as stream:
        assert (locate(stream.fileno(), start, length) is None) == (
            name not in ("expanded", "eight bits")
        )
        with pytest.raises(zipfile.BadZipFile):
            locate(stream.fileno(), start, length - 1)


@pytest.mark.parametrize("name", REFUSED)
def test_other_values_are_refused(tmp_path: Path, name: str) -> None:
    path, start, length = _archive(tmp_path, REFUSED[name])
    with open(path, "rb") as stream, pytest.raises(pickle.UnpicklingError):
        load(stream.fileno(), path, start, length)


# --- hostile archives ---------------------------------------------------------------------------


def _zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression, compresslevel=1) as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return stream.getvalue()


def _tensor_pickle(shape: Any = (4,), stride: Any = (1,), offset: Any = 0, key: Any = "0") -> bytes:
    """The pickle that describes a float32 tensor."""

    def written(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = b"(" + b"".join(
        [written("storage"), b"ctorch\nFloatStorage\n", written(key), written("cpu"), written(4)]
    )
    return (
        b"".join(
            [b"\x80\x02", b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, b"tQ"]
            + [
                written(offset),
                written(shape),
                written(stride),
                written(False),
                written(None),
                b"tR.",
            ]
        )
        .replace(b"q\x00", b"")
        .replace(b"q\x01", b"")
    )


def _tensor_zip(numbers: bytes = bytes(16), **described: Any) -> bytes:
    return _zip({"data.pkl": _tensor_pickle(**described), "data/0": numbers})


def _patched(archive: bytes, name: bytes, at: int, value: bytes) -> bytes:
    """`archive` with other bytes in the directory's entry of `name`."""
    found = archive.rindex(b"archive/" + name) - 46 + at
    return archive[:found] + value + archive[found + len(value) :]


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a pickle that inflates": lambda: _zip({"data.pkl": bytes(2**28)}, zipfile.ZIP_DEFLATED),
    "a byte order that inflates": lambda: _zip(
        {"data.pkl": b"\x80\x02N.", "byteorder": b"l" * 2**28}, zipfile.ZIP_DEFLATED
    ),
    "numbers that inflate": lambda: _zip(
        {"data.pkl": _tensor_pickle(), "data/0": bytes(2**20)}, zipfile.ZIP_DEFLATED
    ),
    "a long pickle": lambda: _zip({"data.pkl": bytes(5 << 20)}),
    "no pickle": lambda: _zip({"data/0": b""}),
    "another byte order": lambda: _zip({"data.pkl": b"\x80\x02N.", "byteorder": b"big"}),
    "no zip": lambda: bytes(1000),
    "an empty file": lambda: b"",
    "many entries": lambda: _zip({str(i): b"" for i in range(20_000)}),
    "a directory beyond the file": lambda: _patched(
        _zip({"data.pkl": b"\x80\x02N."}), b"data.pkl", 46 + 16 + 12, b"\xff\xff\xff\x7f"
    ),
    "an entry beyond the file": lambda: _patched(
        _patched(_tensor_zip(), b"data/0", 20, b"\xff\xff\xff\x7f"), b"data/0", 24,
        b"\xff\xff\xff\x7f",
    ),
    "an entry elsewhere": lambda: _patched(_tensor_zip(), b"data/0", 42, b"\x01\x00\x00\x00"),
    "an encrypted entry": lambda: _patched(_tensor_zip(), b"data/0", 8, b"\x01"),
    "two entries of one name": lambda: _zip({"data.pkl": b"\x80\x02N.", "./data.pkl": b""}).replace(
        b"archive/./data.pkl", b"archive_x/data.pkl"
    ),
    "a tensor beyond its numbers": lambda: _tensor_zip(shape=(5,)),
    "an offset beyond its numbers": lambda: _tensor_zip(offset=1),
    "a negative offset": lambda: _tensor_zip(offset=-1),
    "a huge tensor": lambda: _tensor_zip(shape=(2**62, 2**62), stride=(0, 0)),
    "a repeated element": lambda: _tensor_zip(shape=(2**40,), stride=(0,)),
    "a negative stride": lambda: _tensor_zip(shape=(4,), stride=(-1,)),
    "a huge stride": lambda: _tensor_zip(shape=(4,), stride=(2**62,)),
    "no stride": lambda: _tensor_zip(stride=()),
    "a shape of words": lambda: _tensor_zip(shape=("a",)),
    "a shape of truths": lambda: _tensor_zip(shape=(True,)),
    "no shape": lambda: _tensor_zip(shape=None),
    "a storage that is not there": lambda: _tensor_zip(key="1"),
    "a storage by number": lambda: _tensor_zip(key=0),
    "one tensor many times": lambda: _zip(
        {"data.pkl": b"\x80\x02](" + _tensor_pickle()[2:-1] + b"q\x00" + b"h\x00" * 10**5 + b"e.",
         "data/0": bytes(16)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(HOSTILE[name]())
    size = path.stat().st_size

    def refuse() -> None:
        with open(path, "rb") as stream:
            for read in (functools.partial(load, stream.fileno(), path), _locate_alone(stream)):
                with pytest.raises(ARCHIVE_ERRORS) as caught:
                    read(0, size)
                assert len(str(caught.value)) < 300

    assert peak_memory(refuse) < 256 * 2**20


def _locate_alone(stream: Any) -> Any:
    def located(start: int, length: int) -> None:
        if locate(stream.fileno(), start, length) is None:
            raise pickle.UnpicklingError("no block")

    return located


def test_a_large_directory_is_not_read(tmp_path: Path) -> None:
    """The zip's last bytes may say that its directory has gigabytes, in a file with holes."""
    path = tmp_path / "file"
    size = 3 << 30
    with open(path, "wb") as stream:
        stream.truncate(size - 22)
        stream.seek(size - 22)
        stream.write(b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 9, 9, size - 22, 0, 0))

    def refuse() -> None:
        with open(path, "rb") as stream, pytest.raises(zipfile.BadZipFile):
            load(stream.fileno(), path, 0, size)

    assert peak_memory(refuse) < 256 * 2**20


def test_the_tensor_of_these_tests_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(_tensor_zip(torch.arange(4.0).numpy().tobytes()))
    with open(path, "rb") as stream:
        found = load(stream.fileno(), path, 0, path.stat().st_size)
    assert torch.equal(found, torch.arange(4.0))
