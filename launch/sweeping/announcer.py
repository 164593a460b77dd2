"""Lines about the points of a sweep, as they are measured."""

import time
from dataclasses import dataclass

from launch.sweeping.folder import SweepFolder
from launch.sweeping.options import Options

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Item:
    folder: SweepFolder
    name: str
    stages: tuple[str, ...]
    label: str


class Announcer:
    """Prints a line for each point of a sweep once any process has measured it or failed.

    At the start, one line says how many points were measured before.
    """

    def __init__(self, options: Options) -> None:
        several = bool(options.models)
        self.items = [
            _Item(member.folder, name, stages, f"{member.out.name}: {name}" if several else name)
            for member in options.members
            for name, stages in member.wanted.items()
        ]
        self.open = [item for item in self.items if not item.folder.has(item.name, item.stages)]
        if len(self.open) < len(self.items):
            done = len(self.items) - len(self.open)
            print(f"{done} of {len(self.items)} points are measured", flush=True)

    def news(self) -> None:
        """Print a line for each point that was measured or has failed since the last call."""
        for item in list(self.open):
            if item.folder.is_settled(item.name, item.stages):
                self.open.remove(item)
                done = len(self.items) - len(self.open)
                print(f"[{done}/{len(self.items)}] {_line(item)}", flush=True)

    def wait(self) -> None:
        """Wait until all points are measured or have failed, and print their lines."""
        self.news()
        while self.open:
            time.sleep(POLL_SECONDS)
            self.news()


def _line(item: _Item) -> str:
    failure, record = item.folder.failure(item.name), item.folder.record(item.name)
    if failure is not None or record is None:
        return f"{item.label} failed: {failure}"
    figures = " -> ".join(f"{record[stage]['perplexity']:,.2f}" for stage in item.stages)
    return f"{item.label}: perplexity {figures} ({sum(record['seconds'].values()):.0f} s)"
