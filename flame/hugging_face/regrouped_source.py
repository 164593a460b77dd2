"""A source whose tensors are made from those of another: renamed, stacked, joined or split."""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flame.checkpoint.source import Read, TensorInfo, row_bounds
from flame.errors import UserError, first_line

KEPT_GROUPS = 3
"""Groups whose results wait in memory: those of one layer take turns in a file's order."""

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Group:
    """Tensors that become others together.

    `convert` takes the tensors called `sources`, in this order, and returns the results by name;
    it works on the meta device too. None means that the one source is only renamed to `name`. Of a
    stack it takes those of a few rows too, and returns these rows.
    """

    sources: tuple[str, ...]
    name: str
    convert: Callable[[Sequence[Tensor]], dict[str, Tensor]] | None = None


class HasTensors(Protocol):
    """The part of a source that regrouping needs."""

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, rows: slice | None = None) -> Tensor: ...


@dataclass(frozen=True)
class PromisedTensors:
    """Tensors of known form that a function reads, as a source."""

    infos: dict[str, TensorInfo]
    whole: Read

    def names(self) -> list[str]:
        return sorted(self.infos)

    def info(self, name: str) -> TensorInfo:
        return self.infos[name]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self.whole(name)
        return tensor if rows is None else tensor[rows]


class RegroupedSource:
    """The results of `groups` over the tensors of `source`.

    A renamed tensor is read by rows, and so is one that stacks others: a rank that wants the rows
    of some experts reads these alone. Of other groups all is read. Where several tensors come of a
    group, each is kept until it has been asked for once, so each tensor of `source` is read once if
    names are asked for in sorted order.

    Raises:
        UserError: the tensors of a group do not fit together.
    """

    def __init__(self, source: HasTensors, groups: Sequence[Group]) -> None:
        self._source = source
        self._groups: dict[str, Group] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._stacked: dict[str, int] = {}
        """Of tensors that stack others: how many make a row."""
        for group in groups:
            if group.convert is None:
                self._groups[group.name] = group
                continue
            promises = [source.info(name).promise() for name in group.sources]
            made = _converted(group, promises)
            for name, result in made.items():
                self._groups[name] = group
                self._infos[name] = TensorInfo(tuple(result.shape), result.dtype)
            if len(made) == 1 and (size := _sources_a_row(group, promises, *made.values())):
                self._stacked[group.name] = size

    def names(self) -> list[str]:
        return sorted(self._groups)

    def info(self, name: str) -> TensorInfo:
        group = self._group(name)
        return self._infos[name] if group.convert else self._source.info(group.sources[0])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        group = self._group(name)
        if group.convert is None:
            return self._source.read(group.sources[0], rows)
        start, stop = row_bounds(name, self._infos[name], rows)
        if name in self._stacked and stop > start:
            return self._rows(group, start, stop)
        found = self._results(group, name)
        if rows is None:
            self._forget(group, name)
        part = found if rows is None else found[start:stop]
        is_own = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
        return (
            part if is_own and rows is None else part.clone(memory_format=torch.contiguous_format)
        )

    def _rows(self, group: Group, start: int, stop: int) -> Tensor:
        size = self._stacked[group.name]
        sources = group.sources[start * size : stop * size]
        tensors = [self._source.read(name) for name in sources]
        return _converted(group, tensors)[group.name]

    def _group(self, name: str) -> Group:
        if name not in self._groups:
            raise UserError(
                f"the checkpoint has no tensor {name}: is config.json its own, with the "
                "layer_types of a hybrid?"
            )
        return self._groups[name]

    def _results(self, group: Group, name: str) -> Tensor:
        if name not in self._kept.get(id(group), {}):
            while len(self._kept) >= KEPT_GROUPS:
                self._kept.popitem(last=False)
            tensors = [self._source.read(name) for name in group.sources]
            self._kept[id(group)] = _converted(group, tensors)
        self._kept.move_to_end(id(group))
        return self._kept[id(group)][name]

    def _forget(self, group: Group, name: str) -> None:
        of_group = self._kept[id(group)]
        del of_group[name]
        if not of_group:
            del self._kept[id(group)]


def _sources_a_row(group: Group, promises: Sequence[Tensor], whole: Tensor) -> int:
    """How many sources make a row of the tensor that a group stacks; 0 if it does not stack.

    It does if the sources come in as many parts as it has rows, whose names differ in numbers
    alone, and one part makes one row.
    """
    rows = len(whole) if whole.dim() else 0
    size = len(group.sources) // max(rows, 1)
    if not rows or size * rows != len(group.sources) or rows == 1:
        return 0
    forms = [_NUMBER.sub("#", name) for name in group.sources]
    if any(forms[first : first + size] != forms[:size] for first in range(0, len(forms), size)):
        return 0
    return size if _makes_a_row(group, promises[:size], whole) else 0


def _makes_a_row(group: Group, part: Sequence[Tensor], whole: Tensor) -> bool:
    try:
        made = _converted(group, part)
    except UserError:
        return False
    return [tuple(t.shape) for t in made.values()] == [(1, *whole.shape[1:])]


def _converted(group: Group, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    assert group.convert is not None
    try:
        return group.convert(tensors)
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{group.sources[0]} and {len(group.sources) - 1} more tensors do not fit together as "
            f"{group.name}: {first_line(error)}"
        ) from error
