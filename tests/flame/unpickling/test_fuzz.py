"""Changed steps and safetensors are read, or refused in one line, in little time and memory."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from tests.flame.unpickling.mutations import WAYS

CASES = {"ours": 350, "foreign": 350, "safetensors": 300}
SECONDS = 20
"""A case that takes longer hangs: one that is refused takes milliseconds."""
BYTES = 256 << 20

_WARNING = "slimstate: warning: "
_SPAWN = multiprocessing.get_context("spawn")


@pytest.mark.slow
@pytest.mark.parametrize("form", CASES)
def test_changed_files_are_read_or_refused_in_one_line(tmp_path: Path, form: str) -> None:
    with _SPAWN.Pool(1) as pool:
        refused, wrong = pool.apply(_try_all, (form, tmp_path, CASES[form]))
    print(f"{form}: {CASES[form]} cases, {refused} refused, {CASES[form] - refused} read")
    assert wrong == [] and refused > CASES[form] // 2


def _try_all(form: str, folder: Path, cases: int) -> tuple[int, list[str]]:
    """How many cases are refused, and what is wrong with any; each runs in a fork of its own."""
    pristine = _write_pristine(form, folder)
    _convert(pristine, folder / "out")
    shutil.rmtree(folder / "out")
    # The forks must not touch, and so copy, the objects of their parent.
    gc.collect()
    gc.freeze()
    gc.disable()
    refused, wrong = 0, []
    for seed in range(cases):
        model = folder / "model"
        shutil.copytree(pristine, model)
        WAYS[form](model, random.Random(f"{form}-{seed}"))
        status, text = _run(model, folder / "out", folder / "said", whole=seed % 5 == 0)
        refused += status == 1
        left = sorted(set(os.listdir(folder)) - {"pristine", "model", "said"})
        if status == 0 and left == ["out"]:
            left = []
        lines = [line for line in text.splitlines() if not line.startswith(_WARNING)]
        is_line = len(lines) == 1 and lines[0].startswith("slimstate: error: ")
        if status not in (0, 1) or left or (status == 1 and not is_line) or len(text) > 3000:
            wrong.append(f"case {seed}: status {status}, left {left}: {text[-1500:]}")
        shutil.rmtree(model)
        shutil.rmtree(folder / "out", ignore_errors=True)
    return refused, wrong


def _write_pristine(form: str, folder: Path) -> Path:
    import json

    from tests.flame.checkpoint.other_programs import save_plain
    from tests.flame.tiny import GATED_DELTANET, build, stored_tensors, write_hf_folder, write_run

    state = stored_tensors(build(GATED_DELTANET))
    pristine = folder / "pristine"
    if form == "safetensors":
        return write_hf_folder(pristine, GATED_DELTANET, state)
    nested: dict[str, Any] = {"optimizer": {"lr": 0.5}, "lr_scheduler": {"base_lrs": [0.1, 0.2]}}
    if form == "ours":
        return write_run(pristine, GATED_DELTANET, {**state, **nested})
    save_plain({"model": state, **nested}, pristine / "checkpoint" / "step-2")
    (pristine / "config.json").write_text(json.dumps(GATED_DELTANET))
    return pristine


def _convert(model: Path, out: Path) -> None:
    from flame.checkpoint.convert import convert

    convert(model, out, "hf")


def _read_all(model: Path) -> None:
    """Read every tensor, and of our steps every other entry."""
    from flame.checkpoint.dcp_source import DcpSource
    from flame.checkpoint.reference import resolve

    reference = resolve(model)
    source = reference.source()
    for name in source.names():
        source.read(name)
    if reference.step_folder is not None and not reference.unverified:
        DcpSource(reference.step_folder, everything=True).values()


def _run(model: Path, out: Path, said: Path, whole: bool) -> tuple[int, str]:
    """Exit status and stderr of a forked process that reads a model, or converts it if `whole`."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _work(model, out, said, whole)
        os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(errors="replace")


def _work(model: Path, out: Path, said: Path, whole: bool) -> None:
    from flame.errors import run_stage
    from tests.flame.unpickling.memory import peak_memory

    stream = open(said, "w")  # noqa: SIM115  (the process ends with it)
    os.dup2(stream.fileno(), 2)
    sys.stderr = stream
    faulthandler.enable(stream)
    signal.alarm(SECONDS)
    status = 97

    def work() -> None:
        nonlocal status
        with contextlib.ExitStack() as stack:
            stack.push(_print_traceback)
            try:
                run_stage(lambda: _convert(model, out) if whole else _read_all(model))
                status = 0
            except SystemExit as ended:
                status = int(ended.code or 0)

    if peak_memory(work, collect=False) > BYTES:
        print("it took too much memory", file=stream)
        status = 98
    stream.flush()
    os._exit(status)


def _print_traceback(kind: Any, error: BaseException | None, where: Any) -> bool:
    if error is not None:
        traceback.print_exception(error)
    return True
