"""Counting what a rank sends and reads: collectives by their kind, and bytes of files by name."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMES = {  # of c10d's operators, and of its functional ones
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
}


class Collectives(TorchDispatchMode):
    """Inside the `with` block, counts this rank's collectives, and the bytes of each.

    A collective's bytes are those of its largest tensor list on this rank: the whole of what an
    all-gather brings and a reduce-scatter takes, what the first rank of a gather receives and
    every other one sends. A gather of objects is two collectives: of sizes, and of bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if DTensor in types:
            # Its own collectives come here after it has taken the call apart.
            return NotImplemented
        space, _, name = function._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name.rstrip("_") in _NAMES:
            kind = _NAMES[name.rstrip("_")]
            self.calls[kind] += 1
            self.bytes[kind] += max(map(_nbytes, arguments), default=0)
        return function(*arguments, **(keywords or {}))

    def counted(self) -> tuple[Counter[str], Counter[str]]:
        """Calls and bytes, by the kind of the collective."""
        return self.calls, self.bytes


def _nbytes(argument: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


@contextmanager
def reads_of(folder: Path) -> Iterator[Counter[str]]:
    """Count the bytes that the block reads of the files in `folder`, by their names."""
    counted: Counter[str] = Counter()
    real: dict[str, Any] = {"preadv": os.preadv, "pread": os.pread}

    def watch(name: str) -> Any:
        def read(descriptor: int, *arguments: Any) -> Any:
            found = real[name](descriptor, *arguments)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.parent == folder.resolve():
                counted[path.name] += len(found) if isinstance(found, bytes) else found
            return found

        return read

    for name in real:
        setattr(os, name, watch(name))
    try:
        yield counted
    finally:
        for name, function in real.items():
            setattr(os, name, function)
