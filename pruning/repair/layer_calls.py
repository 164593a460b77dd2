"""Calls of the dense layers with what they gave, in memory up to a bound and on disk beyond it."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flame.errors import UserError
from flame.process.distributed import local_device


@dataclass(frozen=True)
class LayerCall:
    """A token mixer's call on one sequence."""

    args: tuple
    kwargs: dict[str, Any]
    output: Float[Tensor, "B T hidden"]
    """What the dense layer gave."""

    def on(self, device: torch.device | str) -> "LayerCall":
        """The call with its tensors on `device`, cut off from their graph."""
        found = _mapped((self.args, self.kwargs, self.output), lambda x: x.detach().to(device))
        return LayerCall(*found)

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        sizes: list[int] = []
        _mapped((self.args, self.kwargs, self.output), lambda x: sizes.append(x.nbytes))
        return sum(sizes)


@dataclass
class LayerCalls:
    """This process's calls by layer and sequence; `bound` bytes of them are in memory at most."""

    bound: int
    folder: Path
    """Where the others are."""
    in_memory: int = 0
    """Bytes that are in memory."""
    written: int = 0
    """Bytes that went to disk."""
    held: dict[tuple[int, int], LayerCall | Path] = field(default_factory=dict)

    def put(self, layer: int, sequence: int, call: LayerCall) -> None:
        """Keep a call; UserError if the disk does not take it."""
        call = call.on("cpu")
        if self.in_memory + call.size <= self.bound:
            self.in_memory += call.size
            self.held[layer, sequence] = call
            return
        path = self.folder / f"{layer}-{sequence}.pt"
        try:
            torch.save((call.args, call.kwargs, call.output), path)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot write hidden states to {self.folder}, which --repair layer needs for what "
                "exceeds --repair-memory: give a --repair-folder with more room"
            ) from error
        self.written += call.size
        self.held[layer, sequence] = path

    def get(self, layer: int, sequence: int) -> LayerCall | None:
        """A call, on this process's device; None if it is another process's."""
        kept = self.held.get((layer, sequence))
        if isinstance(kept, Path):
            kept = LayerCall(*torch.load(kept, weights_only=True))
        return None if kept is None else kept.on(local_device())

    def drop(self, layer: int) -> None:
        """Forget a layer's calls."""
        for key in [key for key in self.held if key[0] == layer]:
            kept = self.held.pop(key)
            if isinstance(kept, Path):
                kept.unlink()
            else:
                self.in_memory -= kept.size


@contextmanager
def layer_calls(bound: int, folder: Path | None) -> Iterator[LayerCalls]:
    """A store whose files, in `folder` or the system's folder for them, are removed at the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="states-", dir=folder) as own:
        yield LayerCalls(bound, Path(own))


@contextmanager
def calls_tapped(
    mixers: dict[int, nn.Module], on_call: Callable[[int, LayerCall], None]
) -> Iterator[None]:
    """Give `on_call(layer, call)` each call of the dense `mixers`."""

    def deliver(layer: int) -> Callable[..., None]:
        def hook(mixer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            on_call(layer, LayerCall(args, kwargs, first_tensor(output)))

        return hook

    with ExitStack() as stack:
        for layer, mixer in mixers.items():
            stack.callback(mixer.register_forward_hook(deliver(layer), with_kwargs=True).remove)
        yield


def first_tensor(output: Any) -> Tensor:
    """The hidden states that a mixer gives, which some classes return with a cache."""
    return output[0] if isinstance(output, tuple) else output


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with its tensors changed, in tuples, lists and dictionaries too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(part, change) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return value
