"""Run the parts of `benchmarks/gpu.sh`, each command in its own process, and write the page."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.page import page
from benchmarks.gpu.parts import Command, parts
from flame.storage.json_file import read_object_if_any, write_object

RESULTS, PAGE, WORK = "results.json", "page.md", "work"
LIMIT = 580
"""Seconds that one command may take: under the ten minutes of a short queue."""

KEPT = 20_000
"""Characters of a command's output that are kept, its end."""


def main() -> None:
    options = parse()
    out: Path = options.out
    if options.again:
        shutil.rmtree(out / WORK, ignore_errors=True)
        (out / RESULTS).unlink(missing_ok=True)
    (out / WORK).mkdir(parents=True, exist_ok=True)
    results = read_object_if_any(out / RESULTS)
    if results.setdefault("rehearsal", options.rehearse) != options.rehearse:
        raise SystemExit(f"{out} holds {'a' if results['rehearsal'] else 'no'} rehearsal: --again")
    done = results.setdefault("commands", {})
    begin, chosen = time.perf_counter(), parts(out / WORK, options.rehearse)
    for part in chosen:
        if options.parts and part.name not in options.parts:
            continue
        for command in part.commands:
            if command.line in done and command.is_made():
                continue
            if options.minutes and time.perf_counter() - begin > 60 * options.minutes - 30:
                print(f"stops before: {command.line}", flush=True)
                return
            left = (
                60 * options.minutes - (time.perf_counter() - begin) if options.minutes else LIMIT
            )
            print(f"== {part.name}: {command.line}", flush=True)
            done[command.line] = result = run(command, min(LIMIT, left))
            print(result["output"].rstrip(), flush=True)
            print(f"   status {result['status']}, {result['seconds']:.1f} s", flush=True)
            write_object(out / RESULTS, results)
            (out / PAGE).write_text(page(chosen, results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help=f"folder: {PAGE}, {RESULTS}, and {WORK}/ with models")
    add("--parts", nargs="+", metavar="PART", choices=[p.name for p in parts(Path(), False)])
    add("--minutes", type=float, default=0.0, help="start nothing that may end later; 0: no limit")
    add("--again", action="store_true", help="forget what was measured into OUT")
    add("--rehearse", action="store_true", help="the same on a CPU, with tiny sizes: no figures")
    return parser.parse_args()


def run(command: Command, limit: float) -> dict[str, Any]:
    """Run a command in a process group of its own; end all of it after `limit` seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command.words(sys.executable),
        env={**os.environ, **command.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    status: int | str
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = f"stopped after {limit:.0f} s"
    seconds = time.perf_counter() - begin
    return {"status": status, "seconds": seconds, "output": output[-KEPT:]}


if __name__ == "__main__":
    main()
