"""The tap of low-rank gates: what enters the second projection of each."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from pruning.repair.gates import gates_of
from pruning.spaces import Space
from pruning.statistics import GateInput


@contextmanager
def tap_gate_inputs(
    model: nn.Module, spaces: Iterable[Space], on_input: Callable[[int, GateInput], None]
) -> Iterator[None]:
    """Call `on_input(layer, seen)` with the inner channels of the gates in `spaces`.

    They are [tokens, d], detached; where a mixer is given an attention mask, padding is zero.
    """

    def deliver(layer: int, gate: int) -> Callable[..., None]:
        return lambda module, args: on_input(
            layer, GateInput(gate, args[0].detach().flatten(0, -2))
        )

    with ExitStack() as stack:
        for space in spaces:
            for gate, (_, second) in enumerate(gates_of(space)):
                module = model.get_submodule(second.removesuffix(".weight"))
                hook = module.register_forward_pre_hook(deliver(space.layer, gate))
                stack.callback(hook.remove)
        yield
