"""What the points of a sweep are doing, on the terminal of the process that started it.

What the stages of a point say goes to its log. While points are measured, a thread tells the last
line of each log that grew: for a recovery, the step and the loss of its training.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from launch.sweeping.folder import SweepFolder

EVERY_SECONDS = 30.0
LONGEST_LINE = 160
TAIL_BYTES = 4096


@contextmanager
def telling(
    folder: SweepFolder, wanted: Mapping[str, Sequence[str]], every: float = EVERY_SECONDS
) -> Iterator[None]:
    """Tell on stderr, `every` so many seconds, what the unsettled points do.

    Args:
        wanted: the stages to measure each point in, by its name.
    """
    # A copy, because a process that measures a point sends its own stderr to the point's log.
    stderr, ended = os.dup(2), threading.Event()
    seen = {name: last_line(folder, name) for name in wanted}

    def tell() -> None:
        while not ended.wait(every):
            for name, stages in wanted.items():
                line = last_line(folder, name)
                if line and line != seen[name] and not folder.is_settled(name, stages):
                    os.write(stderr, f"{name}: {line}\n".encode())
                seen[name] = line

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.close(stderr)


def last_line(folder: SweepFolder, name: str) -> str:
    """The last line that is not empty in a point's log, without control characters; or nothing."""
    try:
        with open(folder.log(name), "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = "".join(sign for sign in lines[-1] if sign.isprintable()) if lines else ""
    return found if len(found) <= LONGEST_LINE else f"{found[: LONGEST_LINE - 1]}…"
