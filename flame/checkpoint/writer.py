"""Writing a DCP step with a hash for each file and, if asked, one tensor in memory at a time."""

import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flame.checkpoint.source import Read
from flame.process.peers import Peers, raise_cause
from flame.storage.checksums import METADATA, HashingFile, hash_bytes, write_checksums, write_file


def write_checkpoint(
    state_dict: Mapping[str, Any],
    folder: Path,
    extra_files: Mapping[str, bytes],
    peers: Peers,
    read: Read | None = None,
) -> None:
    """Write `state_dict` into `folder`; see `flame.checkpoint.steps.save_step`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.save(
                dict(state_dict),
                storage_writer=ChecksumWriter(folder, extra_files),
                planner=LazySavePlanner(read),
                process_group=peers.group,
                no_dist=peers.alone,
            )
        except CheckpointException as error:
            raise_cause(error, f"cannot write {folder}")


class LazySavePlanner(DefaultSavePlanner):
    """DCP's save planner, which replaces meta-device tensors when they are written.

    Args:
        read: returns the tensor to write in place of the meta-device tensor of that flat name.
    """

    def __init__(self, read: Read | None = None) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        if not isinstance(found, Tensor) or not found.is_meta:
            return found
        if self._read is None:
            raise ValueError(f"{index.fqn} is on the meta device and has no content to save")
        return _checked(index.fqn, self._read(index.fqn), found)


@dataclass(frozen=True)
class FileHash:
    """A file's name and hash, sent to the first rank among the write results of another."""

    name: str
    value: str


class ChecksumWriter(FileSystemWriter):
    """DCP's writer, with one file per rank that is hashed while it is written, and extra files.

    Tensors pass through memory one by one. When all ranks are done, `checksums.json` is written,
    and after it `.metadata`, whose hash `checksums.json` holds too.

    Args:
        path: the folder to write.
        extra_files: content of small files, by name.
    """

    def __init__(self, path: Path, extra_files: Mapping[str, bytes]) -> None:
        super().__init__(path, overwrite=False)
        self.extra_files = extra_files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write_items(plan, planner) if plan.items else [])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        folder = Path(self.path)
        written = [result for of_rank in results for result in of_rank]
        stored = [result.storage_data for result in written]
        hashes = {file.name: file.value for file in stored if isinstance(file, FileHash)}
        for name, data in self.extra_files.items():
            # An empty file would make the step look cut short.
            hashes[name] = write_file(folder / name, data or b"\n")
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_meta = StorageMeta(save_id=self.save_id)
        metadata.storage_data = {
            result.index: result.storage_data
            for result in written
            if isinstance(result.storage_data, _StorageInfo)
        }
        content = pickle.dumps(metadata)
        write_checksums(folder, hashes | {METADATA: hash_bytes(content)})
        write_file(folder / f"{METADATA}.tmp", content)
        (folder / f"{METADATA}.tmp").rename(folder / METADATA)

    def _write_items(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        name = f"{plan.storage_data.prefix}0.distcp"
        with HashingFile(Path(self.path) / name) as stream:
            results = [_write_item(stream, name, item, planner) for item in plan.items]
            file = FileHash(name, stream.finish())
        return [*results, WriteResult(MetadataIndex(name), 0, file)]


def _write_item(
    stream: HashingFile, name: str, item: WriteItem, planner: SavePlanner
) -> WriteResult:
    start = stream.tell()
    data = planner.resolve_data(item)
    if isinstance(data, io.BytesIO):
        stream.write(data.getbuffer())
    else:
        torch.save(_compact(data), stream)
    length = stream.tell() - start
    return WriteResult(item.index, length, _StorageInfo(name, start, length))


def _compact(tensor: Tensor) -> Tensor:
    """Return `tensor` on the CPU, copied if it is a view of a larger storage."""
    tensor = tensor.detach().cpu()
    return tensor.clone() if tensor.untyped_storage().size() != tensor.nbytes else tensor


def _checked(name: str, tensor: Tensor, promise: Tensor) -> Tensor:
    """Return `tensor` if it has the promised shape and dtype; raise ValueError otherwise."""
    if tensor.shape != promise.shape or tensor.dtype != promise.dtype:
        raise ValueError(
            f"{name}: promised {tuple(promise.shape)} {promise.dtype}, "
            f"read {tuple(tensor.shape)} {tensor.dtype}"
        )
    return tensor
