"""A source whose tensors are made from those of another: renamed, stacked, joined or split."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flame.checkpoint.source import Read, TensorInfo, row_bounds
from flame.errors import UserError, first_line

KEPT_GROUPS = 3
"""Groups whose results are kept in memory: those of one layer take turns in a file's order."""


@dataclass(frozen=True)
class Group:
    """Tensors that become others together.

    `convert` takes the tensors called `sources`, in this order, and returns the results by name;
    it works on the meta device too. None means that the one source is only renamed to `name`.
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

    A renamed tensor is read by rows. Of others the whole group is read, and the last few groups are
    kept, so each tensor of `source` is read once if names are asked for in sorted order.

    Raises:
        UserError: the tensors of a group do not fit together.
    """

    def __init__(self, source: HasTensors, groups: Sequence[Group]) -> None:
        self._source = source
        self._groups: dict[str, Group] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        for group in groups:
            if group.convert is None:
                self._groups[group.name] = group
                continue
            promises = [source.info(name).promise() for name in group.sources]
            for name, result in _converted(group, promises).items():
                self._groups[name] = group
                self._infos[name] = TensorInfo(tuple(result.shape), result.dtype)

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
        whole = self._results(group)[name]
        return (whole if rows is None else whole[start:stop]).clone(
            memory_format=torch.contiguous_format
        )

    def _group(self, name: str) -> Group:
        if name not in self._groups:
            raise UserError(f"the checkpoint has no tensor {name}")
        return self._groups[name]

    def _results(self, group: Group) -> dict[str, Tensor]:
        if id(group) not in self._kept:
            while len(self._kept) >= KEPT_GROUPS:
                self._kept.popitem(last=False)
            tensors = [self._source.read(name) for name in group.sources]
            self._kept[id(group)] = _converted(group, tensors)
        self._kept.move_to_end(id(group))
        return self._kept[id(group)]


def _converted(group: Group, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    assert group.convert is not None
    try:
        return group.convert(tensors)
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{group.sources[0]} and {len(group.sources) - 1} more tensors do not fit together as "
            f"{group.name}: {first_line(error)}"
        ) from error
