"""Saving DCP steps with a hash for each file and, if asked, one tensor in memory at a time."""

import io
import os
import pickle
import shutil
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from flame.checkpoint.steps import TEMPORARY, delete, step_folder
from flame.errors import UserError
from flame.process.peers import Peers, raise_cause
from flame.storage.checksums import METADATA, HashingFile, hash_bytes, write_checksums, write_file
from flame.storage.replacement import swap


def save_step(
    state_dict: Mapping[str, Any],
    folder: Path,
    step: int,
    extra_files: Mapping[str, bytes] | None = None,
    process_group: dist.ProcessGroup | None = None,
    *,
    read: Read | None = None,
    alone: bool = False,
) -> Path:
    """Save `state_dict` as `folder/step-N` and return that path. Collective unless `alone`.

    Args:
        state_dict: as `torch.distributed.checkpoint.save` takes it, nested and sharded or not.
        folder: the checkpoint folder, on a file system that all ranks share; made if missing.
        step: the step's number; an existing folder of this step is replaced in one move.
        extra_files: content of small files to lie in the step, by name; rank 0's are written.
        process_group: the ranks that save together; None for all.
        read: returns the content of a meta-device entry, by its flat name, when it is written. So
            a state larger than memory can be saved, one tensor at a time.
        alone: save in this process by itself, even if a process group exists.

    Raises:
        UserError: raised on every rank if any rank cannot write; nothing is left behind.
    """
    peers = Peers(process_group, alone)
    final = step_folder(folder, step)
    temporary = Path(folder) / f"{TEMPORARY}{step}-{peers.from_first(uuid.uuid4().hex[:8])}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(
                dict(state_dict),
                storage_writer=ChecksumWriter(temporary, extra_files or {}),
                planner=LazySavePlanner(read),
                process_group=peers.group,
                no_dist=peers.alone,
            )
        peers.agree(lambda: _publish(temporary, final) if peers.is_first else None)
    except BaseException as error:
        if peers.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointException):
            raise_cause(error, f"cannot write {temporary}")
        raise
    return final


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
        # DCP sends the index to all ranks now, where nobody looks at it.
        metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data = {}, {}, None

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


def _publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name, replacing an older folder in the same instant."""
    try:
        _sync_folder(temporary)
        if not final.exists():
            os.rename(temporary, final)
        elif swap(temporary, final):
            shutil.rmtree(temporary)
        else:
            delete(final)
            os.rename(temporary, final)
        _sync_folder(final.parent)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
