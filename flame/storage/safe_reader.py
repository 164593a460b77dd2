"""Reading DCP steps without running what they contain, and without trusting their bytes.

Pickles are read by `flame.storage.safe_unpickling` alone, and every file is compared with its
recorded hash before it is used.
"""

import io
import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from flame.errors import UserError, first_line, some
from flame.process.peers import Peers, raise_cause
from flame.storage.archive import locate, read_into
from flame.storage.checksums import (
    METADATA,
    HashAlong,
    check_file,
    check_hash,
    check_listed,
    hash_bytes,
    read_checksums,
    readable,
)
from flame.storage.safe_unpickling import UNPICKLING_ERRORS, load_entry, load_index

Check = Literal["first", "along", "never"]


def load_step(
    state_dict: dict[str, Any],
    step: Path,
    process_group: dist.ProcessGroup | None = None,
    *,
    alone: bool = False,
    optional: Collection[str] = (),
) -> None:
    """Load a step into `state_dict` in place, resharding as needed. Collective unless `alone`.

    A rank compares the files that it reads with their hashes first. Entries that only the step has
    are ignored.

    Args:
        state_dict: what to load; the step must hold every entry, in its shape.
        step: the step folder.
        process_group: the ranks that load together; None for all.
        alone: load in this process by itself, even if a process group exists.
        optional: flat names of entries that keep their value if the step lacks them.

    Raises:
        UserError: raised on every rank if any rank finds a part damaged, hostile or missing.
    """
    reader, peers = SafeReader(step), Peers(process_group, alone)
    # DCP would log a traceback and look for per-rank metadata, so the index is read beforehand.
    peers.agree(reader.read_metadata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(
                state_dict,
                storage_reader=reader,
                planner=SafeLoadPlanner(optional),
                process_group=peers.group,
                no_dist=peers.alone,
            )
        except CheckpointException as error:
            raise_cause(error, f"cannot read {step}")


class SafeReader(FileSystemReader):
    """DCP's reader of step folders, with an allow-list for the index and hashes that are checked.

    Args:
        path: the step folder.
        check: when files are compared with their hashes. `first`: the whole file, before anything
            in it is used. `along`: while it is read, so that only `finish` finds a mismatch; for
            work that can be thrown away then. `never`: another reader checks them.
    """

    def __init__(self, path: Path, check: Check = "first") -> None:
        super().__init__(path)
        self._check = check
        self._folder = Path(path)
        self._index: Metadata | None = None
        self._hashes: dict[str, str] = {}
        self._checked: set[str] = set()
        self._along: dict[str, HashAlong] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the step's index; raise `UserError` if it is missing, damaged or hostile."""
        if self._index is None:
            path = self._folder / METADATA
            with readable(path):
                content = path.read_bytes()
            self._hashes = read_checksums(self._folder)
            if hash_bytes(content) != self._hashes.get(METADATA):
                raise UserError(f"{path} is damaged (its hash differs): use another step")
            self._index = load_index(content, path)
            self.storage_data = self._index.storage_data
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of `plan`, after checking the hash of each file once."""
        for item in plan.items:
            self._checked_place(item.storage_index)
        with self._explained(item.storage_index.fqn for item in plan.items):
            return super().read_data(plan, planner)

    def read_rows(self, chunk: MetadataIndex, first: int, target: Tensor) -> None:
        """Fill `target` with whole rows of a stored chunk of a tensor.

        The numbers come straight from the file where the chunk is stored as one contiguous block.

        Args:
            chunk: the chunk's key in the index.
            first: the chunk's first row that is read.
            target: a CPU tensor of the chunk's dtype, and of its shape but for dimension 0.

        Raises:
            UserError: the chunk is damaged or has fewer rows.
        """
        rows = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        if not self._read_block(chunk, first, rows):
            rows = self.read_entry(chunk)
            if isinstance(rows, Tensor) and rows.dim() == target.dim() > 0:
                rows = rows[first : first + target.shape[0]]
            if not isinstance(rows, Tensor) or rows.shape != target.shape:
                raise UserError(f"cannot read {chunk.fqn} of {self._folder}: its shape differs")
        if rows is not target:
            target.copy_(rows)

    def read_entry(self, index: MetadataIndex) -> Any:
        """Return a stored entry, unpickled as plain data; raise `UserError` if it is damaged."""
        place = self._checked_place(index)
        with self._explained([index.fqn]), open(self._folder / place.relative_path, "rb") as stream:
            stream.seek(place.offset)
            return load_entry(index.fqn, io.BytesIO(stream.read(place.length)))

    def offset(self, index: MetadataIndex) -> int:
        """Return where a stored chunk begins in its file, 0 if the index does not say."""
        return self.storage_data[index].offset if index in self.storage_data else 0

    def finish(self) -> None:
        """Check the hash of every file of the step; what was read `along` is not read again."""
        for name in sorted(self._hashes):
            path = self._folder / name
            with readable(path):
                found = self._hash_along(name).finish()
            check_hash(path, found, self._hashes[name])

    def _read_block(self, chunk: MetadataIndex, first: int, rows: Tensor) -> bool:
        """Read rows from one contiguous block; return False if they do not lie in one."""
        place = self._checked_place(chunk)
        path = self._folder / place.relative_path
        with self._explained([chunk.fqn]), open(path, "rb", buffering=0) as stream:
            block = locate(stream.fileno(), place.offset, place.length)
            if block is None or block.dtype != rows.dtype or len(block.shape) != rows.dim():
                return False
            if block.shape[1:] != rows.shape[1:]:
                return False
            if block.shape and first + rows.shape[0] > block.shape[0]:
                return False
            begin = block.offset + first * math.prod(block.shape[1:]) * block.dtype.itemsize
            data = read_into(stream.fileno(), path, begin, rows)
        if self._check == "along":
            with readable(path):
                self._hash_along(place.relative_path).take(begin, data)
        return True

    @contextmanager
    def _explained(self, names: Iterable[str]) -> Iterator[None]:
        try:
            yield
        except (*UNPICKLING_ERRORS, OSError) as error:
            entries, why = some(sorted(set(names)), 3), first_line(error)
            raise UserError(f"cannot read {entries} of {self._folder}: {why}") from error

    def _checked_place(self, index: MetadataIndex) -> _StorageInfo:
        """Return where an entry is stored; with `check` `first`, compare its file's hash before.

        A file is hashed only once. Raises `UserError` if the index lacks the entry, no hash is
        recorded for its file, or the hash differs.
        """
        place = self.storage_data.get(index)
        if place is None:
            raise UserError(f"{self._folder / METADATA} does not say where {index.fqn} is")
        name = place.relative_path
        check_listed(self._folder, name, self._hashes)
        if self._check == "first" and name not in self._checked:
            check_file(self._folder, name, self._hashes)
            self._checked.add(name)
        return place

    def _hash_along(self, name: str) -> HashAlong:
        if name not in self._along:
            self._along[name] = HashAlong(self._folder / name)
        return self._along[name]


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner with `weights_only=True` and messages that a person can act on.

    Args:
        optional: names of entries that keep their present value if the step lacks them.
    """

    def __init__(self, optional: Collection[str] = ()) -> None:
        super().__init__(allow_partial_load=bool(optional))
        self._optional = frozenset(optional)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        missing = sorted(set(self.state_dict) - set(saved) - self._optional)
        if missing:
            lacking = some(missing, 3)
            raise UserError(f"the checkpoint lacks {lacking}: it is of another model or run")
        for name in self.state_dict.keys() & saved.keys():
            _check_form(name, self.state_dict[name], saved[name])
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], load_entry(name, value))


def _check_form(name: str, value: Any, saved: Any) -> None:
    """Raise `UserError` if a stored tensor is to be loaded into a value of another form."""
    if not isinstance(saved, TensorStorageMetadata):
        return
    if not isinstance(value, torch.Tensor):
        raise UserError(f"the checkpoint's {name} is a tensor, this run expects another value")
    if value.shape != saved.size:
        shapes = f"has shape {tuple(saved.size)}, this run expects {tuple(value.shape)}"
        raise UserError(f"the checkpoint's {name} {shapes}: it is of another model")
