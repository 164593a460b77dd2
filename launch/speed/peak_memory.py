"""The most memory that an action holds at once, beyond what was there before it."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of `action`, over those allocated when it starts.

    On CUDA what the allocator handed out. On a CPU, whose allocator does not count, the bytes of
    all tensors that operators returned and that are alive together: the same at every run, without
    what a single operator uses inside.
    """
    if device.type != "cuda":
        with _LiveTensors() as live:
            action()
        return live.most
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _LiveTensors(TorchDispatchMode):
    """Adds up the storages that operators return, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._known = {_key(value) for value in tree_leaves((args, kwargs)) if _is_tensor(value)}
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if _is_tensor(value):
                self._count(value)
        return result

    def _count(self, value: Tensor) -> None:
        storage, key = value.untyped_storage(), _key(value)
        if key in self._sizes or key in self._known:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _key(value: Tensor) -> int:
    return value.untyped_storage()._cdata
