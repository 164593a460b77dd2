"""A stand-in for an accelerator: it records where the host would wait for one.

On a GPU an operator is launched and the host goes on; it waits where it asks for a value. Here all
run on the CPU, at once. So tensors of the model, and whatever is computed from them, are taken to
lie on a device, and each call that would make the host wait for them is noted.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[4]
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::is_nonzero", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
}  # fmt: skip
"""Operators whose result's value or shape the host must know."""
READS = ("cpu", "numpy", "tolist", "__array__", "__dlpack__")
"""Methods of a tensor that read its memory without calling an operator."""


class StandInDevice(TorchDispatchMode):
    """In the block, `events` grows by `("launch", step)`, `("wait", what)` and `("late", step)`.

    A late read is of memory of the host that a step copied its values to without waiting.

    Args:
        tensors: those that lie on the device when the block begins.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.events: list[tuple[str, Any]] = []
        self.step = 0
        # The storages themselves, so that none of their addresses is used again.
        self._device: dict[int, Any] = {}
        self._copies: dict[int, tuple[Any, int]] = {}
        self._constants: dict[int, Any] = {}
        self._take(tensors)

    def launch(self, step: int) -> None:
        """Note that the first work of `step` is about to be given to the device."""
        self.step = step
        self.events.append(("launch", step))

    def moved(self, value: Any) -> Any:
        """Return a copy of `value` on the device."""
        if not isinstance(value, Tensor):
            return value
        copied = value.clone()
        self._take([copied])
        return copied

    def holds(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._device

    def read(self, tensor: Tensor, how: str) -> None:
        """Note that the host reads `tensor`, if it lies on the device or is a copy from there."""
        if self.holds(tensor):
            self.events.append(("wait", f"{how} in {_caller()}"))
        elif _address(tensor) in self._copies:
            self.events.append(("late", self._copies[_address(tensor)][1]))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # It comes again with the parts of this rank.
            return NotImplemented
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = function.name().partition(".")[0]
        touched = any(map(self.holds, given))
        if touched:
            if self._waits(name, args, kwargs):
                self.events.append(("wait", f"{name} in {_caller()}"))
            if any(_address(t) in self._constants and t.dim() for t in given):
                self.events.append(("wait", f"copy from pageable memory in {_caller()}"))
        result = function(*args, **kwargs)
        if name == "aten::lift_fresh" and not _caller().startswith("kernels/"):
            # `torch.tensor(…)`; those of the CPU's operators stand for what is inside a kernel.
            self._constants[_address(result)] = result.untyped_storage()
        if name == "aten::copy_" and touched and not self.holds(args[0]) and args[2:] == (True,):
            self._copies[_address(args[0])] = args[0].untyped_storage(), self.step
        elif touched:
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self._take([*outputs, *(given if _writes(function) else [])])
        return result

    def _waits(self, name: str, args: Any, kwargs: Any) -> bool:
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            return any(index is not None and index.dtype == torch.bool for index in args[1])
        if name == "aten::repeat_interleave":
            return kwargs.get("output_size") is None
        return name in WAITS

    def _take(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._device[_address(tensor)] = tensor.untyped_storage()


@contextmanager
def recording(trainer: Any) -> Iterator[StandInDevice]:
    """Let `trainer` train on a stand-in device in the block; yield what records it."""
    (model,) = trainer.model_parts
    optimizer = trainer.optimizers.optimizers[0]
    state = [value for own in optimizer.state.values() for value in own.values()]
    held = [*model.parameters(), *model.buffers(), *state]
    teacher = trainer.objective.teacher
    held += [*teacher.model.parameters(), *teacher.model.buffers()] if teacher else []
    device = StandInDevice([t.to_local() if isinstance(t, DTensor) else t for t in held])
    launch = trainer._launch

    def launching(taken: Any) -> Any:
        device.launch(trainer.step)
        return launch(taken)

    trainer._launch, trainer._to_device = launching, device.moved
    before = {name: getattr(Tensor, name) for name in READS}
    for name, method in before.items():
        setattr(Tensor, name, _noting(device, name, method))
    try:
        with device:
            yield device
    finally:
        for name, method in before.items():
            setattr(Tensor, name, method)


def _noting(device: StandInDevice, name: str, method: Any) -> Any:
    def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        device.read(tensor, name)
        return method(tensor, *args, **kwargs)

    return read


def _writes(function: Any) -> bool:
    """Whether an operator writes into one of its arguments."""
    schema = function._schema
    return function.namespace in ("c10d", "_c10d_functional", "fsdp") or any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in schema.arguments
    )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _caller() -> str:
    """The innermost line of this project's that is at work."""
    frame: Any = sys._getframe(1)
    own = [ROOT / package for package in ("flame", "kernels")]
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(path.is_relative_to(folder) for folder in own):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "no line of this project's"
