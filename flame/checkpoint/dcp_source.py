"""The tensors of a step folder, as a source."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from flame.checkpoint.foreign_names import stock_names
from flame.checkpoint.source import TensorInfo, row_bounds
from flame.errors import UserError
from flame.storage.checksums import CHECKSUMS
from flame.storage.safe_reader import Check, SafeReader

TRAINING_PREFIXES = ("optimizer.", "lr_scheduler.", "train_state.", "dataloader.")
"""Beginnings of the names in a step that belong to the training state, not to the model."""


class DcpSource:
    """The tensors of a step folder: the model's, or with `everything` the training state's too.

    A tensor may lie in chunks over many files. Only the chunks that overlap the wanted rows are
    read, one at a time.

    Args:
        step: the step folder.
        everything: include the training state.
        check: when files are compared with their hashes (see `SafeReader`); the tensors of an
            `unverified` step get their stock names.
    """

    def __init__(self, step: Path, everything: bool = False, check: Check = "first") -> None:
        self._reader = SafeReader(step, check)
        self._step = step
        index = self._reader.read_metadata()
        entries, meta = index.state_dict_metadata, index.storage_meta
        if check == "unverified" and meta is not None and meta.checkpoint_id is None:
            # DCP's own writers record where they wrote; ours does not, and records hashes.
            raise UserError(f"{step} has lost its {CHECKSUMS}: it is damaged, use another step")
        left_out = () if everything else TRAINING_PREFIXES
        own = {name: name for name in entries if not name.startswith(left_out)}
        if check == "unverified":
            own = stock_names(entries)
        self._stored = own
        """The name in the step of each entry, by its stock name."""
        held = {name: entries[stored] for name, stored in own.items()}
        self._tensors = {n: e for n, e in held.items() if isinstance(e, TensorStorageMetadata)}
        self._values = {n for n, e in held.items() if isinstance(e, BytesStorageMetadata)}

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise UserError(f"{self._step} has no tensor {name}")
        entry = self._tensors[name]
        return TensorInfo(tuple(entry.size), entry.properties.dtype)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        info = self.info(name)
        start, stop = row_bounds(name, info, rows)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        promise = torch.empty(shape, dtype=info.dtype, device="meta")
        chunks = [c for c in self._tensors[name].chunks if _covered(promise, c, start).numel() > 0]
        for chunk in chunks:
            # Before memory is taken for what may not be there.
            self._reader.check_stored(MetadataIndex(self._stored[name], chunk.offsets))
        target = torch.empty(shape, dtype=info.dtype)
        for chunk in chunks:
            first = max(start - chunk.offsets[0], 0) if info.shape else 0
            part = _covered(target, chunk, start)
            self._reader.read_rows(MetadataIndex(self._stored[name], chunk.offsets), first, part)
        return target

    def values(self) -> dict[str, Any]:
        """Return the entries that are not tensors (numbers, strings, lists), by flat name."""
        return {
            name: self._reader.read_entry(MetadataIndex(self._stored[name]))
            for name in sorted(self._values)
        }

    def stored_order(self) -> list[str]:
        """Return the names in the order in which the tensors lie on disk, the fastest to read."""

        def offset(name: str) -> int:
            first = self._tensors[name].chunks[0].offsets
            return self._reader.offset(MetadataIndex(self._stored[name], first))

        return sorted(self._tensors, key=lambda name: (offset(name), name))

    def finish(self) -> None:
        """Compare every file with its hash; raise `UserError` naming the first that differs."""
        self._reader.finish()


def _covered(target: Tensor, chunk: ChunkStorageMetadata, start: int) -> Tensor:
    """Return the part of `target`, the tensor's rows from `start` on, that a chunk covers."""
    begins = [offset - (start if dim == 0 else 0) for dim, offset in enumerate(chunk.offsets)]
    ends = [begin + size for begin, size in zip(begins, chunk.sizes, strict=True)]
    return target[tuple(slice(max(b, 0), max(e, 0)) for b, e in zip(begins, ends, strict=True))]
