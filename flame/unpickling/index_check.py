"""Checking that a step's index is one, and that its chunks make up each tensor exactly.

A chunk that is missing would leave a part of a tensor as the memory happened to be; a chunk that
overlaps another would leave what was read last.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from flame.errors import UserError

_MOST_COMPARISONS = 10**7
"""Pairs of chunks of a tensor that are compared; a mesh of 8 × 1,024 processes needs 8,192."""


def check_index(index: Any, path: Path) -> None:
    """Raise `UserError`, which names the file `path`, for what is wrong in an index.

    Types, names of files, offsets, lengths and sizes are checked, and that a tensor's chunks tile
    it: they lie within it, no two overlap, and together they have all its elements.
    """
    try:
        _check_types(index)
        for name, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                _check_tensor(name, entry, index.storage_data)
        _check_places(index.storage_data)
    except _WrongError as error:
        raise UserError(f"{path} is not a DCP index ({error}): use another step") from None


class _WrongError(Exception):
    """What is wrong with the index."""


def _check_types(index: Any) -> None:
    if type(index) is not Metadata or not vars(index):
        raise _WrongError("it holds another value")
    for name, entry in index.state_dict_metadata.items():
        if type(name) is not str or not name.isprintable():
            raise _WrongError("an entry has no proper name")
        if type(entry) is not BytesStorageMetadata and not _is_filled(entry, TensorStorageMetadata):
            raise _WrongError(f"{name!r:.80} is of another type")
    for key, place in index.storage_data.items():
        if not _is_filled(key, MetadataIndex) or not _is_filled(place, _StorageInfo):
            raise _WrongError("where its entries lie is of another type")
    for name, keys in (index.planner_data or {}).items():
        if type(name) is not str or type(keys) is not tuple:
            raise _WrongError("its planner data is of another type")
        if not all(type(key) in (str, int) for key in keys):
            raise _WrongError("its planner data is of another type")


def _is_filled(value: Any, kind: type) -> bool:
    return type(value) is kind and bool(vars(value))


def _check_places(places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Check the place of each entry in the files; two entries must not share bytes."""
    for key, place in places.items():
        name = place.relative_path
        if name in ("", ".", "..") or "/" in name or "\0" in name or not name.isprintable():
            raise _WrongError(f"{key.fqn!r:.80} lies in {name!r:.80}, which is no file of the step")
        if place.offset < 0 or place.length < 0:
            raise _WrongError(f"{key.fqn!r:.80} has a negative offset or length")
        if place.transform_descriptors:
            raise _WrongError(f"{key.fqn!r:.80} is stored compressed, which cannot be read here")
    ordered = sorted((p.relative_path, p.offset, p.length) for p in places.values() if p.length)
    for (file, begin, length), (next_file, next_begin, _) in pairwise(ordered):
        if file == next_file and next_begin < begin + length:
            raise _WrongError(f"two entries share bytes of {file}")


def _check_tensor(
    name: str, entry: TensorStorageMetadata, places: dict[MetadataIndex, _StorageInfo]
) -> None:
    shape, itemsize = tuple(entry.size), entry.properties.dtype.itemsize
    chunks = []
    for chunk in entry.chunks:
        if not _is_filled(chunk, ChunkStorageMetadata):
            raise _WrongError(f"a chunk of {name!r:.80} is of another type")
        begins, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if not len(begins) == len(sizes) == len(shape):
            raise _WrongError(f"a chunk of {name!r:.80} has another number of dimensions")
        if any(b + s > d for b, s, d in zip(begins, sizes, shape, strict=True)):
            raise _WrongError(f"a chunk of {name!r:.80} reaches beyond the tensor's {shape}")
        # A process without a part of the tensor saves an empty chunk, whose place does not count.
        if 0 not in sizes:
            chunks.append((begins, tuple(map(sum, zip(begins, sizes, strict=True)))))
            place = places.get(MetadataIndex(name, chunk.offsets))
            if place is None:
                raise _WrongError(f"it does not say where a chunk of {name!r:.80} lies")
            if place.length < math.prod(sizes) * itemsize:
                raise _WrongError(f"a chunk of {name!r:.80} is larger than what is stored")
    elements = sum(
        math.prod(e - b for b, e in zip(begins, ends, strict=True)) for begins, ends in chunks
    )
    if elements != math.prod(shape) or _overlap(chunks, len(shape)):
        raise _WrongError(f"the chunks of {name!r:.80} do not make up its {shape} exactly")


_Box = tuple[tuple[int, ...], tuple[int, ...]]


def _overlap(boxes: Sequence[_Box], dimensions: int) -> bool:
    """Whether any two boxes, of begins and ends, overlap.

    They are swept along the dimension that most of them are cut in; a box is compared with those
    that have not ended where it begins.
    """
    if len(boxes) < 2:
        return False
    if dimensions == 0:
        return True
    distinct = [len({begins[dim] for begins, _ in boxes}) for dim in range(dimensions)]
    along, compared = distinct.index(max(distinct)), 0
    open_boxes: list[_Box] = []
    for box in sorted(boxes, key=lambda box: box[0][along]):
        open_boxes = [other for other in open_boxes if other[1][along] > box[0][along]]
        compared += len(open_boxes)
        if compared > _MOST_COMPARISONS:
            raise _WrongError("a tensor is cut into too many chunks")
        if any(_meet(box, other) for other in open_boxes):
            return True
        open_boxes.append(box)
    return False


def _meet(one: _Box, other: _Box) -> bool:
    return all(
        b < f and c < e for b, e, c, f in zip(one[0], one[1], other[0], other[1], strict=True)
    )
