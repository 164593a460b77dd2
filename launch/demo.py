"""Stage `demo`: pretrain, prune, recover and evaluate a small model on this machine.

The corpus is the running interpreter's standard library, so nothing is downloaded. Each step is a
command that a user runs, called in one process group; a step whose output is there is skipped.
"""

import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.options import option
from flame.process.output_checks import check_output, check_place, mark_as_made
from flame.stage import Stage
from flame.storage.json_file import read_object, read_object_if_any, write_object
from launch.cli import COMMANDS
from launch.reporting.demo_summary import (
    CONTENT,
    DECODING_FILE,
    MODELS,
    PERPLEXITY_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    TIMES_FILE,
    print_summary,
    write_summary,
)
from launch.reporting.envelope import command_line

RECIPES = Path(__file__).parent / "recipes"
VOCABULARY = 4096
ALONE = ("tokenizer", "bench", "report")
"""Commands that rank 0 runs alone; the other ranks wait at the end of the step."""

TITLE = "slimstate demo: half the key channels of a small GatedDeltaNet"

DECODING = (
    "--measure", "decode", "--batch-sizes", "8", "--decode-length", "48", "--prompt-length", "16",
)  # fmt: skip
BENCH = (
    "--lengths", "512", "--batch-sizes", "1", "--decode-length", "16", "--train-batch", "4",
    "--train-length", "256", "--repeats", "3",
)  # fmt: skip
ANALYSIS = ("--length", "512", "--sequences", "2")
HELDOUT = 200
"""Held-out sequences: they reach into the twelfth document, as intervals need some."""

VIRTUAL_SHARDS = 8


@dataclass(frozen=True)
class Options:
    out: Path = option(Path("runs/demo"), "folder to write")
    steps: int = option(600, "pretraining steps", least=1, metavar="N")
    recovery_steps: int = option(120, "steps of recovery", least=1, metavar="N")
    ratio: float = option(0.5, "part of the key channels removed", above=0, below=1)
    sequences: int = option(32, "sequences for calibration", least=1, metavar="N")
    heldout: int = option(HELDOUT, "held-out sequences", least=1, metavar="N")
    seed: int = option(0, "of weights, data order and random channels", least=0, metavar="N")
    overwrite: bool = option(False, "start afresh: remove an earlier demo in OUT")


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError for an unfit number of processes, or an OUT that the demo cannot use."""
    if VIRTUAL_SHARDS % world_size:
        raise UserError(f"--nproc {world_size}: the demo runs on 1, 2, 4 or 8 processes")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file: choose a folder")
    check_place(options.out)
    _check_same_demo(options)


def run(options: Options) -> None:
    """Run what is not done yet; write the summary and the report; print the table. Collective."""
    from flame.process.distributed import barrier, process_group, rank

    if _is_finished(options):
        if int(os.environ.get("RANK", "0")) == 0:
            print_summary(options.out)
        return
    import flame.register  # noqa: F401

    with process_group():
        if rank() == 0:
            _prepare_folder(options)
        barrier()
        _run_steps(options)


@dataclass(frozen=True)
class Call:
    """One command line, and a test of whether it has been run."""

    name: str
    words: tuple[Any, ...]
    done: Callable[[], bool] = lambda: False

    @property
    def line(self) -> str:
        return shlex.join(["slimstate", self.name, *map(str, self.words)])

    def run(self) -> None:
        """Run the command in this process group unless it is done. Collective."""
        from flame.process.distributed import from_rank_zero, rank

        stage = import_module(COMMANDS[self.name].module).STAGE
        words = [str(word) for word in self.words]
        if from_rank_zero(self.done()):
            return
        if self.name not in ALONE:
            stage.call(words)
        elif rank() == 0:
            options = stage.parse(words)
            stage.check(options, 1)
            stage.run(options)


def steps_of(options: Options) -> dict[str, list[Call]]:
    """Return the command lines of the demo by their step, in order."""
    out, seed = options.out, ("--seed", options.seed)
    folders = {name: out / name for name in MODELS}
    dense, continued, pruned, random, recovered = folders.values()
    tokenizer, stats, export = out / "tokenizer", out / "statistics", out / "export"
    perplexity, fidelity = out / PERPLEXITY_FILE, out / "fidelity.json"
    decoding, bench = out / DECODING_FILE, out / "bench.json"

    def once(output: Path, name: str, *words: Any) -> Call:
        return Call(name, words, output.exists)

    def train(recipe: str, folder: Path, steps: int, *more: Any) -> Call:
        where = ("--config", RECIPES / recipe, "--job.dump_folder", folder)
        what = ("--training.steps", steps, "--debug.seed", options.seed, *more)
        return Call("train", where + what, lambda: _is_trained(folder, steps))

    begin = ("--model.config", RECIPES / "demo_config.json", "--data.tokenizer", tokenizer)
    more = "demo_recover.toml", options.recovery_steps, "--model.init"
    prune = ("--ratio", options.ratio, *seed, "--method")
    calibrate = ("--methods", "drrqr", "--sequences", options.sequences, *seed)
    heldout = ("--perplexity", "--max-sequences", options.heldout)
    against = ("--against", dense)
    compared = (*against, "--max-sequences", options.heldout)
    made = pruned, recovered, continued
    return {
        "tokenizer": [once(tokenizer, "tokenizer", tokenizer, "--size", VOCABULARY)],
        "pretrain": [train("demo_pretrain.toml", dense, options.steps, *begin)],
        "calibrate": [once(stats, "calibrate", dense, stats, *calibrate)],
        "prune": [
            once(pruned, "prune", dense, pruned, *prune, "drrqr", "--stats", stats),
            once(random, "prune", dense, random, *prune, "random"),
        ],
        "recover": [train(more[0], recovered, more[1], more[2], pruned)],
        "continue_dense": [train(more[0], continued, more[1], more[2], dense)],
        "export": [once(export, "convert", recovered, export, "--to", "hf")],
        # Not skipped here: `eval` itself measures only what its file lacks.
        "evaluate": [Call("eval", (*folders.values(), *heldout, "--json", perplexity))],
        "compare": [once(fidelity, "eval", *made, *compared, "--json", fidelity)],
        "analyze": [
            once(out / "analysis", "analyze", recovered, out / "analysis", *against, *ANALYSIS)
        ],
        "decode": [
            once(decoding, "bench", *folders.values(), *DECODING, *seed, "--json", decoding)
        ],
        "bench": [once(bench, "bench", recovered, *against, *BENCH, "--json", bench)],
    }


def _run_steps(options: Options) -> None:
    """Run all steps, write the summary, and let `report` make the page. Collective."""
    from flame.process.distributed import barrier, rank

    seconds = read_object_if_any(options.out / TIMES_FILE)
    steps = steps_of(options)
    report = Call("report", (options.out, "--title", TITLE, "--overwrite"))
    for name, calls in steps.items():
        if rank() == 0:
            print(f"== {name}", flush=True)
        begin = time.perf_counter()
        for call in calls:
            call.run()
        barrier()
        # A step that was skipped keeps the time of the run that did it.
        seconds[name] = max(time.perf_counter() - begin, seconds.get(name, 0.0))
        if rank() == 0:
            write_object(options.out / TIMES_FILE, seconds)
    if rank() == 0:
        lines = [call.line for call in [*sum(steps.values(), []), report]]
        facts = {"seed": options.seed, "options": _plain_options(options)}
        write_summary(options.out, command_line("demo", options), seconds, lines, facts)
    report.run()
    if rank() == 0:
        print_summary(options.out)


def _is_finished(options: Options) -> bool:
    files = (options.out / SUMMARY_FILE, options.out / REPORT_FILE)
    return not options.overwrite and all(file.is_file() for file in files)


def _check_same_demo(options: Options) -> None:
    """Raise UserError if OUT was begun with other options, or holds something else than a demo."""
    begun = options.out / "options.json"
    if options.overwrite:
        return check_output(options.out, overwrite=True)
    if not begun.is_file():
        if options.out.is_dir() and any(options.out.iterdir()):
            raise UserError(f"{options.out} is not empty and no demo: choose another --out")
        return
    if read_object(begun) != _plain_options(options):
        raise UserError(
            f"{options.out} was begun with other options: choose another --out, or --overwrite"
        )


def _prepare_folder(options: Options) -> None:
    if options.overwrite:
        shutil.rmtree(options.out.resolve(), ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    mark_as_made(options.out, CONTENT)
    write_object(options.out / "options.json", _plain_options(options))


def _plain_options(options: Options) -> dict[str, Any]:
    return {k: v for k, v in asdict(options).items() if k not in ("out", "overwrite")}


def _is_trained(folder: Path, steps: int) -> bool:
    from flame.checkpoint.steps import latest_whole_step

    return latest_whole_step(folder / "checkpoint") == steps


STAGE = Stage(
    "demo",
    "Pretrain, prune, recover and evaluate a small model on this machine.",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
