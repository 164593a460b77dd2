"""The most bytes of tensors that are alive together while something runs, without its allocator."""

import weakref
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside its block: what operators return, as long as it lives, looked at every few calls.

    Storages that FSDP2 empties and fills again count with what they have. Of a DTensor, this rank's
    part counts.
    """

    EVERY = 16

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._note(leaf.to_local() if isinstance(leaf, DTensor) else leaf)
        self.calls += 1
        if self.calls % self.EVERY == 0:
            alive = (storage() for storage in list(self._alive.values()))
            self.peak = max(self.peak, sum(each.nbytes() for each in alive if each is not None))
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._alive.pop(key, None))
