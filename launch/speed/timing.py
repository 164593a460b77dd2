"""How long something takes: warm, in turns, with the spread of the repetitions."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Repeated values of one quantity; a quantity that is counted has one."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def least(self) -> float:
        return min(self.runs)

    @property
    def most(self) -> float:
        return max(self.runs)

    @classmethod
    def counted(cls, value: float) -> "Spread":
        return cls((value,))

    @classmethod
    def rates(cls, amount: float, seconds: Sequence[float]) -> "Spread":
        """`amount` a second, for each time."""
        return cls(tuple(amount / time_ for time_ in seconds))

    @classmethod
    def milliseconds(cls, seconds: Sequence[float], parts: int = 1) -> "Spread":
        """Milliseconds of one of `parts` equal parts, for each time."""
        return cls(tuple(1000 * time_ / parts for time_ in seconds))


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that `action` takes: between two events on CUDA, by the clock on a CPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000


def take_turns(actions: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What `repeats` calls of each action return, by name, after one call that does not count.

    Round by round each is called once, so that what else the machine does falls on all of them. The
    first round meets cold caches and compiles kernels.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            found[name].append(action())
    return {name: values[1:] for name, values in found.items()}
