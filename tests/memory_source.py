"""Tensors in memory as a `TensorSource`."""

from dataclasses import dataclass

from torch import Tensor

from flame.checkpoint.source import TensorInfo


@dataclass(frozen=True)
class MemorySource:
    tensors: dict[str, Tensor]

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows]
