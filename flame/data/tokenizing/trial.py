"""Loading a tokenizer in a process of its own first.

The library's parser, of compiled code, panics, aborts or runs for ever on some files. There that
costs one process, within bounds of time and memory.
"""

import os
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from flame.data.tokenizing.files import TOKENIZER_JSON
from flame.errors import UserError

PATIENCE = 300
"""Seconds to wait for the process, whose own bound is on processor time."""

CHILD = Path(__file__).with_name("child.py")


def try_tokenizer(folder: Path) -> None:
    """Load the tokenizer of a folder and encode a little text, in another process.

    Raises:
        UserError: it cannot be loaded, cannot encode, or takes too much time or memory.
    """
    file = folder / TOKENIZER_JSON
    path = file if file.is_file() else folder
    stat = path.stat()
    reason = _problem(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if reason is not None:
        raise UserError(f"cannot load the tokenizer in {folder}: {reason}")


@lru_cache(maxsize=32)
def _problem(path: str, size: int, changed: int) -> str | None:
    """Return why a tokenizer cannot be used; a file is tried again when it has changed."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(CHILD), path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            env={**os.environ, **quiet},
        )
    except subprocess.TimeoutExpired:
        return "it takes too long"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        slow = name in ("SIGXCPU", "SIGKILL")
        return "it takes too long" if slow else f"the library that reads it ends by {name}"
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "the library that reads it fails"
