"""The tensors of a model as a plan leaves them, one at a time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flame.checkpoint.source import TensorInfo, TensorSource
from flame.errors import UserError
from pruning.planning.choose import check_tensor_finite
from pruning.planning.new_tensors import Later, made
from pruning.transform.slices import Slice, Slices, slice_tensor

OPTIMIZER_STATE = "optimizer.state."
"""Beginning of the names of optimizer entries in a step: then the parameter's, then the entry's."""


class NewTensors(Protocol):
    """Tensors that a plan has made: an open safetensors file, or `InMemory`."""

    def keys(self) -> Iterable[str]:
        """Their names."""
        ...

    def get_tensor(self, name: str) -> Tensor:
        """One of them."""
        ...


@dataclass(frozen=True)
class InMemory:
    """The new tensors of a plan that are not in its file, or not read from there yet."""

    tensors: Mapping[str, Tensor | Later]

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return made(self.tensors[name])


class SlicedSource:
    """A source as it is after a plan: sliced, replaced where the plan says so, and finite.

    Tensors that the plan does not touch come out as they are, bit for bit.

    Args:
        source: the tensors before, those of the optimizer among them or not.
        slices: from `pruning.transform.slices.slices_of`.
        replaced: tensors that take the place of sliced ones.
    """

    def __init__(
        self, source: TensorSource, slices: Slices, replaced: NewTensors | None = None
    ) -> None:
        self._source, self._slices, self._replaced = source, slices, replaced
        self._names = set(source.names())
        self._new = set(replaced.keys()) if replaced is not None else set()
        self._check_names()

    def names(self) -> list[str]:
        return sorted(self._names)

    def info(self, name: str) -> TensorInfo:
        info = self._source.info(name)
        shape = list(info.shape)
        for part in self._slices_of(name):
            shape[part.dim] = len(part.kept)
        return TensorInfo(tuple(shape), info.dtype)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor after the plan, or rows of it; UserError if what is read is not finite."""
        slices = self._slices_of(name)
        if parameter_of(name) in self._new:
            tensor = self._read_new(name)
        elif rows is None or any(part.dim == 0 for part in slices):
            tensor = slice_tensor(name, self._source.read(name), slices)
        else:
            tensor, rows = slice_tensor(name, self._source.read(name, rows), slices), None
        check_tensor_finite(name, tensor)
        return tensor if rows is None else tensor[rows]

    def _read_new(self, name: str) -> Tensor:
        info = self.info(name)
        if parameter_of(name) != name:
            # Moments of other channels than these: the optimizer begins anew, counting from zero.
            return torch.zeros(info.shape, dtype=info.dtype)
        assert self._replaced is not None
        tensor = self._replaced.get_tensor(name)
        if tuple(tensor.shape) != info.shape:
            raise UserError(
                f"the plan replaces {name} by shape {tuple(tensor.shape)}, its channels leave "
                f"{info.shape}"
            )
        return tensor.to(info.dtype)

    def _slices_of(self, name: str) -> tuple[Slice, ...]:
        parameter = parameter_of(name)
        if parameter == name:
            return self._slices.get(name, ())
        if parameter not in self._slices:
            return ()
        same_shape = self._source.info(name).shape == self._source.info(parameter).shape
        return self._slices[parameter] if same_shape else ()

    def _check_names(self) -> None:
        for name in sorted({*self._slices, *self._new} - self._names):
            raise UserError(f"the checkpoint lacks {name}, which the plan prunes")
        kernels = [name for name in self._slices if name.endswith("conv1d.weight")]
        biases = {name.removesuffix("weight") + "bias" for name in kernels}
        for bias in sorted(biases & self._names):
            raise UserError(
                f"{bias}: a convolution makes silu(bias) of a channel of zeros, so that removing "
                "one changes the model: only convolutions without bias can be pruned"
            )
        for name, slices in self._slices.items():
            shape = self._source.info(name).shape
            if any(part.dim >= len(shape) or shape[part.dim] != part.size for part in slices):
                raise UserError(f"{name} has shape {shape}, which config.json does not lead to")


def parameter_of(name: str) -> str:
    """The parameter that an entry of a step belongs to; other names are returned as they are."""
    if not name.startswith(OPTIMIZER_STATE):
        return name
    return name.removeprefix(OPTIMIZER_STATE).rpartition(".")[0]
