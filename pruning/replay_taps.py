"""The tap of replays: a layer's call with what is needed to repeat it up to the output projection.

It hooks the output norm, for its gate, and the output projection, for its weight. Both run inside
the layer, where FSDP2 has gathered their parameters.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from pruning.adapters.interface import Adapter
from pruning.mixers import find_mixers, output_norm, output_projection
from pruning.op_call import OpCall
from pruning.replay import Operator, Replay


@contextmanager
def tap_replays(
    model: nn.Module,
    adapter: Adapter,
    operator: Operator,
    calls: MutableMapping[int, OpCall],
    on_replay: Callable[[int, Replay], None],
) -> Iterator[None]:
    """Call `on_replay(layer, replay)` for each pass of a mixer of `model` whose call is known.

    Args:
        operator: the family's, looked up before it was tapped.
        calls: the delta-rule calls by layer, as `tap_ops` delivers them; each is taken out.
    """
    gates: dict[int, tuple[Tensor, ...]] = {}

    def deliver(layer: int, norm: nn.Module) -> Callable[..., None]:
        def hook(output: nn.Module, args: tuple) -> None:
            gate, call = gates.pop(layer), calls.pop(layer, None)
            if call is not None:
                weight: Tensor = output.weight.detach()  # type: ignore[operator,union-attr]
                outputs = args[0].detach().flatten(0, -2)
                on_replay(layer, Replay(call, operator, norm, gate, weight, outputs))

        return hook

    def keep(layer: int) -> Callable[..., None]:
        def hook(norm: nn.Module, args: tuple) -> None:
            gates[layer] = tuple(gate.detach() for gate in args[1:])

        return hook

    with ExitStack() as stack:
        for layer, mixer in find_mixers(model, adapter).items():
            norm, output = output_norm(mixer), output_projection(mixer)
            stack.callback(norm.register_forward_pre_hook(keep(layer)).remove)
            stack.callback(output.register_forward_pre_hook(deliver(layer, norm)).remove)
        yield
