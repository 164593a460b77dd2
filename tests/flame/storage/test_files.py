"""Bytes on the disk: hashed while read, written past the page cache."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flame.storage import direct_file
from flame.storage.checksums import HashAlong, HashingFile, hash_bytes
from flame.storage.direct_file import DirectFile
from flame.storage.safetensors_file import SafetensorsFile, write_safetensors


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 1, 2], [1, 3], [], [2, 2, 0]])
def test_a_hash_along_the_way_is_that_of_the_file(tmp_path: Path, order: list[int]) -> None:
    data = os.urandom(4000)
    (tmp_path / "file").write_bytes(data)
    hasher = HashAlong(tmp_path / "file")
    for part in order:
        hasher.take(1000 * part + 10, memoryview(data)[1000 * part + 10 : 1000 * part + 900])
    assert hasher.finish() == hash_bytes(data)


def test_what_was_read_is_what_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    hasher = HashAlong(tmp_path / "file")
    hasher.take(10, memoryview(b"other bytes"))
    assert hasher.finish() != hash_bytes(bytes(100))


def _write(path: Path, data: bytes, pieces: list[int]) -> None:
    file, rest = DirectFile(path), memoryview(data)
    for size in pieces:
        file.write(rest[:size])
        rest = rest[size:]
    assert file.tell() == len(data) - len(rest)
    file.write(rest)
    file.finish()


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 50_000])
@pytest.mark.parametrize("folder", ["disk", "memory"])
def test_files_hold_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, folder: str
) -> None:
    monkeypatch.setattr(direct_file, "BLOCK", 8192)
    if folder == "memory" and not os.access("/dev/shm", os.W_OK):
        pytest.skip("no file system in memory, which takes no direct writes")
    path = tmp_path / "file" if folder == "disk" else Path(f"/dev/shm/test-{os.getpid()}")
    data = os.urandom(size)
    try:
        _write(path, data, [1, 5000, 20_000])
        assert path.read_bytes() == data
        assert path.stat().st_mode & 0o111 == 0
    finally:
        path.unlink()


def test_file_systems_without_direct_writes_get_cached_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.write, []

    def write(descriptor: int, data: Any) -> int:
        if not refused:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data)

    monkeypatch.setattr(direct_file, "BLOCK", 8192)
    monkeypatch.setattr(os, "write", write)
    data = os.urandom(30_000)
    _write(tmp_path / "file", data, [])
    assert (tmp_path / "file").read_bytes() == data and refused


def test_an_error_of_the_disk_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_file, "BLOCK", 8192)
    monkeypatch.setattr(os, "write", write)
    for size in (100, 8193, 100_000):
        with pytest.raises(OSError, match="No space left"):
            with HashingFile(tmp_path / "file") as file:
                file.write(bytes(size))
                file.finish()


def test_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(12.0).view(3, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.ones(0, 4),
        "half": torch.randn(2, 3, 4).bfloat16(),
        "bool": torch.tensor([True, False]),
    }
    promised = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    write_safetensors(tmp_path / "ours", promised, read)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert sorted(asked) == sorted(tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    loaded = load_file(tmp_path / "ours")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_file_larger_than_memory_is_read_by_rows(tmp_path: Path) -> None:
    rows, row = 2**30, 2**10
    entry = {"dtype": "U8", "shape": [rows, row], "data_offsets": [0, rows * row]}
    header = json.dumps({"weight": entry}).encode()
    with (tmp_path / "huge").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.seek(rows * row - 1, os.SEEK_CUR)
        # The rest of the file is a hole, which takes no place on the disk.
        stream.write(b"\7")
    file = SafetensorsFile(tmp_path / "huge")
    last = file.read("weight", rows - 2, rows)
    assert last.shape == (2, row) and int(last.sum()) == int(last[-1, -1]) == 7
