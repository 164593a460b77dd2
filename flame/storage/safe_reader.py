"""Reading DCP steps without running what they contain, and without trusting their bytes.

Pickles are read by `flame.unpickling.index` alone, and every file is compared with its
recorded hash before it is used.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from flame.errors import UserError, first_line
from flame.storage.checksums import (
    METADATA,
    HashAlong,
    check_file,
    check_hash,
    check_listed,
    hash_bytes,
    missing,
    read_checksums,
)
from flame.storage.compared import is_compared
from flame.storage.input_file import opened, read_into
from flame.storage.load_planner import SafeLoadPlanner
from flame.unpickling.archive import ARCHIVE_ERRORS, Block, load, locate
from flame.unpickling.index import load_index, read_index

Check = Literal["first", "along", "never", "unverified"]


class SafeReader(FileSystemReader):
    """DCP's reader of step folders, with an allow-list for the index and hashes that are checked.

    Args:
        path: the step folder.
        check: when files are compared with their hashes. `first`: the whole file, before anything
            in it is used, unless this job has compared the step before. `along`: while it is read,
            so that only `finish` finds a mismatch; for work that can be thrown away then. `never`:
            another reader checks them. `unverified`: the step has no hashes, because another
            program wrote it.
    """

    def __init__(self, path: Path, check: Check = "first") -> None:
        super().__init__(path)
        self._check = check
        self._folder = Path(path)
        self._index: Metadata | None = None
        self._hashes: dict[str, str] = {}
        self._checked: set[str] = set()
        self._trusted = False
        """Whether all files were compared before."""
        self._along: dict[str, HashAlong] = {}
        self._sizes: dict[str, dict[torch.Size, torch.Size]] = {}
        """Sizes of the chunks of each tensor that was read, by their offsets."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the step's index; raise `UserError` if it is missing, damaged or hostile."""
        if self._index is None:
            path = self._folder / METADATA
            content = read_index(path)
            if self._check != "unverified":
                self._hashes = read_checksums(self._folder)
                self._trusted = self._check == "first" and is_compared(self._folder)
                if hash_bytes(content) != self._hashes.get(METADATA):
                    raise UserError(f"{path} is damaged (its hash differs): use another step")
            self._index = load_index(content, path)
            self.storage_data = self._index.storage_data
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of `plan`, after checking the hash of each file once."""
        assert isinstance(planner, SafeLoadPlanner)
        places = [(self._checked_place(item.storage_index), item) for item in plan.items]
        places.sort(key=lambda each: (each[0].relative_path, each[0].offset))
        for _, item in places:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_value(item, self.read_entry(item.storage_index))
            else:
                target = planner.resolve_tensor(item).detach()
                target.copy_(self._part(item))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_rows(self, chunk: MetadataIndex, first: int, target: Tensor) -> None:
        """Fill `target` with whole rows of a stored chunk of a tensor.

        The numbers come straight from the file where the chunk is stored as one contiguous block.

        Args:
            chunk: the chunk's key in the index.
            first: the chunk's first row that is read.
            target: a CPU tensor of the chunk's dtype, and of its shape but for dimension 0.

        Raises:
            UserError: the chunk is damaged, or stored in another form than the index says.
        """
        form = sizes, dtype = self._form(chunk)
        rows = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        with self._opened(chunk) as (descriptor, path, place):
            whole = locate(descriptor, place.offset, place.length) or load(
                descriptor, path, place.offset, place.length
            )
            if not isinstance(whole, Tensor | Block) or (whole.shape, whole.dtype) != form:
                raise UserError(f"cannot read {chunk.fqn} of {self._folder}: its form differs")
            if isinstance(whole, Tensor):
                rows.copy_(whole[first : first + len(rows)] if sizes else whole)
            else:
                begin = whole.offset + first * math.prod(sizes[1:]) * dtype.itemsize
                data = read_into(descriptor, path, begin, rows)
                if self._check == "along":
                    self._hash_along(place.relative_path).take(begin, data)
        if rows is not target:
            target.copy_(rows)

    def read_entry(self, index: MetadataIndex) -> Any:
        """Return a stored entry, read as plain data; raise `UserError` if it is anything else."""
        with self._opened(index) as (descriptor, path, place):
            try:
                return load(descriptor, path, place.offset, place.length)
            except ARCHIVE_ERRORS as error:
                what, why = f"entry {index.fqn} of the checkpoint", first_line(error)
                raise UserError(f"{what} is not plain data: {why} ({path})") from error

    def check_stored(self, index: MetadataIndex) -> None:
        """Raise `UserError` unless the file of an entry is long enough to hold it."""
        with self._opened(index):
            pass

    def offset(self, index: MetadataIndex) -> int:
        """Return where a stored chunk begins in its file, 0 if the index does not say."""
        return self.storage_data[index].offset if index in self.storage_data else 0

    def finish(self) -> None:
        """Check the hash of every file of the step; what was read `along` is not read again."""
        for name in sorted(self._hashes):
            check_hash(self._folder / name, self._hash_along(name).finish(), self._hashes[name])

    def _part(self, item: ReadItem) -> Tensor:
        """Return the part of a stored chunk that a plan asks for."""
        sizes, dtype = self._form(item.storage_index)
        begins, lengths = list(item.storage_offsets), list(item.lengths)
        first, rows = (begins[0], lengths[0]) if sizes else (0, 0)
        part = torch.empty((rows, *sizes[1:]) if sizes else (), dtype=dtype)
        self.read_rows(item.storage_index, first, part)
        return narrow_tensor_by_index(part, [0, *begins[1:]][: part.dim()], lengths)

    def _form(self, chunk: MetadataIndex) -> tuple[torch.Size, torch.dtype]:
        """Return the sizes and the dtype that the index says of a chunk."""
        entry = self.read_metadata().state_dict_metadata[chunk.fqn]
        assert isinstance(entry, TensorStorageMetadata) and chunk.offset is not None
        if chunk.fqn not in self._sizes:
            self._sizes[chunk.fqn] = {each.offsets: each.sizes for each in entry.chunks}
        return self._sizes[chunk.fqn][chunk.offset], entry.properties.dtype

    @contextmanager
    def _opened(self, index: MetadataIndex) -> Iterator[tuple[int, Path, _StorageInfo]]:
        """Open the file of an entry; what is wrong in it is raised as a `UserError`."""
        place = self._checked_place(index)
        path = self._folder / place.relative_path
        try:
            with opened(path, missing(path)) as descriptor:
                if place.offset + place.length > os.fstat(descriptor).st_size:
                    raise UserError(f"cannot read {index.fqn}: {path} ends too early")
                yield descriptor, path, place
        except (*ARCHIVE_ERRORS, OSError) as error:
            why = first_line(error)
            raise UserError(f"cannot read {index.fqn} of {self._folder}: {why}") from error

    def _checked_place(self, index: MetadataIndex) -> _StorageInfo:
        """Return where an entry is stored; with `check` `first`, compare its file's hash before.

        A file is hashed only once. Raises `UserError` if the index lacks the entry, no hash is
        recorded for its file, or the hash differs.
        """
        place = self.storage_data.get(index)
        if place is None:
            raise UserError(f"{self._folder / METADATA} does not say where {index.fqn} is")
        name = place.relative_path
        if self._check != "unverified":
            check_listed(self._folder, name, self._hashes)
        if self._check == "first" and not self._trusted and name not in self._checked:
            check_file(self._folder, name, self._hashes)
            self._checked.add(name)
        return place

    def _hash_along(self, name: str) -> HashAlong:
        if name not in self._along:
            self._along[name] = HashAlong(self._folder / name)
        return self._along[name]
