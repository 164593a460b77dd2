"""What rank 0 holds in memory while it chooses channels."""

import math
from collections.abc import Iterable, Mapping

from flame.checkpoint.source import TensorInfo
from flame.checkpoint.streaming import BUFFER
from pruning.adapters.interface import Config
from pruning.methods import Method
from pruning.repair.gates import gates_of
from pruning.spaces import Space, output_axis
from pruning.statistics import Statistic

WEIGHT = 12
"""Bytes for each number of a space's tensors: in float32, and a copy of a method's in float64."""
SUMS = 3
"""Copies of a space's sums: as read, and what a method makes of them."""


def held_by_choosing(
    config: Config,
    infos: Mapping[str, TensorInfo],
    spaces: Iterable[Space],
    method: Method,
    needs: Iterable[type[Statistic]],
    refitted: Iterable[Space] = (),
) -> int:
    """The most bytes held while `method` chooses in `spaces`, one after another.

    Args:
        config, infos: the model's.
        spaces: those that are pruned.
        needs: the statistics that the plan needs, read for one space at a time.
        refitted: head spaces of the layers whose output projections are refitted, one by one.
    """
    spaces, needs = list(spaces), list(needs)
    numbers = {space.name: _numbers(infos, [a.fqn for a in space.axes]) for space in spaces}
    hidden = int(config["hidden_size"])
    held = max(WEIGHT * numbers[s.name] + SUMS * _sums(s, needs, hidden) for s in spaces)
    # These stay in memory until the plan is written, in float64.
    if hasattr(method, "new_tensors"):
        held += 8 * sum(numbers.values())
    held += 8 * sum(_numbers(infos, gate) for space in spaces for gate in gates_of(space))
    return max([held, *(_fit(infos, space) for space in refitted)]) + BUFFER


def say_choosing(held: int) -> None:
    """Print what rank 0 holds at most while it chooses."""
    print(
        f"rank 0 alone chooses, one layer after another: in memory at most {held / 2**20:,.0f} MiB",
        flush=True,
    )


def _numbers(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> int:
    # A tensor that is missing is complained of by what reads it.
    return sum(math.prod(infos[name].shape) for name in set(names) if name in infos)


def _sums(space: Space, needs: Iterable[type[Statistic]], hidden: int) -> int:
    own = [kind.zeros(space, hidden, "meta") for kind in needs if space.kind in kind.kinds]
    return sum(total.nbytes for one in own for total in one.state_dict().values())


def _fit(infos: Mapping[str, TensorInfo], space: Space) -> int:
    """Bytes of the ridge regression of a layer: projections, sums, and their factors, float64."""
    hidden, out = infos[output_axis(space).fqn].shape
    return 8 * 5 * (hidden * out + out * out)
