"""Run the tests marked `interpreter` in a process in which Triton interprets its kernels.

`TRITON_INTERPRET=1` decides at the import of triton, so one process cannot have both. The worker is
started once; a test's parameters and fixtures must be picklable, and it cannot use `monkeypatch`.

The interpreter of Triton 3.9 is not a GPU in two ways: a float32 becomes a bfloat16 by cutting off
bits (an error of up to a whole unit in the last place, not half), and arithmetic on bfloat16 itself
is wrong, so kernels widen what they load.
"""

import importlib
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any


def run_interpreted(module: str, function: str, arguments: dict[str, Any]) -> None:
    """Call a module's function in the worker; what it raises is raised here."""
    _worker().submit(_call, module, function, arguments).result()


@cache
def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_interpret)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _call(module: str, function: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), function)(**arguments)
