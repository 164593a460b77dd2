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
from flame.stage import Stage
from flame.storage.json_file import read_object, read_object_if_any, write_object
from launch.cli import COMMANDS
from launch.reporting.envelope import command_line, enveloped, write_result

RECIPES = Path(__file__).parent / "recipes"
SUMMARY_FILE = "summary.json"
PERPLEXITY_FILE = "perplexity.json"
DECODING_FILE = "decoding.json"
REPORT_FILE = "report.html"
TIMES_FILE = "seconds.json"
VOCABULARY = 4096

TITLE = "slimstate demo: half the key channels of a small GatedDeltaNet"

MODELS = ("dense", "dense_continued", "pruned", "random", "recovered")
"""Rows of the summary, and the folders of their models."""

SCORES = ("perplexity", "bits_per_byte", "parameters", "state_bytes")
DECODING = (
    "--measure", "decode", "--batch-sizes", "8", "--decode-length", "48", "--prompt-length", "16",
)  # fmt: skip
BENCH = (
    "--lengths", "512", "--batch-sizes", "1", "--decode-length", "16", "--train-batch", "4",
    "--train-length", "256", "--repeats", "3",
)  # fmt: skip
ANALYSIS = ("--length", "512", "--sequences", "2")
COMPARED = 16
"""Held-out sequences of the comparison with the dense model, at most."""

VIRTUAL_SHARDS = 8


@dataclass(frozen=True)
class Options:
    out: Path = option(Path("runs/demo"), "folder to write")
    steps: int = option(600, "pretraining steps", least=1, metavar="N")
    recovery_steps: int = option(120, "steps of recovery", least=1, metavar="N")
    ratio: float = option(0.5, "part of the key channels removed", above=0, below=1)
    sequences: int = option(32, "sequences for calibration", least=1, metavar="N")
    heldout: int = option(128, "held-out sequences", least=1, metavar="N")
    seed: int = option(0, "of weights, data order and random channels", least=0, metavar="N")
    overwrite: bool = option(False, "start afresh: remove an earlier demo in OUT")


def check(options: Options, world_size: int = 1) -> None:
    """Refuse numbers that make no demo, and a folder that is somebody else's."""
    from flame.process.atomic_output import check_output

    if VIRTUAL_SHARDS % world_size:
        raise UserError(f"--nproc {world_size}: the demo runs on 1, 2, 4 or 8 processes")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file: choose a folder")
    check_output(options.out, overwrite=True)
    _check_same_demo(options)


def run(options: Options) -> None:
    """Run what is not done yet; write the summary and the report; print the table. Collective."""
    from flame.process.distributed import barrier, process_group, rank

    if _is_finished(options):
        if int(os.environ.get("RANK", "0")) == 0:
            _print_summary(options.out)
        return
    import flame.register  # noqa: F401

    with process_group():
        if rank() == 0:
            _prepare_folder(options)
        barrier()
        Demo(options).run()


class Demo:
    """The steps of one demo folder, in order."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.out = options.out
        self.seconds: dict[str, float] = _read_times(options.out)
        self.commands: list[str] = []

    def run(self) -> None:
        """Run all steps. Collective."""
        from flame.process.distributed import rank

        self._step("tokenizer", self._tokenizer)
        self._step("pretrain", self._pretrain)
        self._step("calibrate", self._calibrate)
        self._step("prune", self._prune)
        self._step("recover", lambda: self._recover("recovered", "pruned"))
        self._step("continue_dense", lambda: self._recover("dense_continued", "dense"))
        self._step("export", self._export)
        self._step("evaluate", self._evaluate)
        self._step("compare", self._compare)
        self._step("analyze", self._analyze)
        self._step("decode", self._decode)
        self._step("bench", self._bench)
        if rank() == 0:
            self._write_summary()
        self._command_alone("report", [self.out, "--title", TITLE, "--overwrite"])
        if rank() == 0:
            _print_summary(self.out)

    def _step(self, name: str, action: Callable[[], None]) -> None:
        from flame.process.distributed import barrier, rank

        if rank() == 0:
            print(f"== {name}", flush=True)
        begin = time.perf_counter()
        action()
        barrier()
        # A step that was skipped keeps the time of the run that did it.
        self.seconds[name] = max(time.perf_counter() - begin, self.seconds.get(name, 0.0))
        if rank() == 0:
            write_object(self.out / TIMES_FILE, self.seconds)

    def _tokenizer(self) -> None:
        from flame.data.corpus import stdlib_texts
        from flame.data.tokenizer import train_tokenizer
        from flame.process.distributed import rank

        if rank() == 0 and not (self.out / "tokenizer" / "tokenizer.json").is_file():
            train_tokenizer(stdlib_texts("train"), VOCABULARY, self.out / "tokenizer")

    def _pretrain(self) -> None:
        out = self.out / "dense"
        self._train("demo_pretrain.toml", out, self.options.steps, [
            "--model.config", str(RECIPES / "demo_config.json"),
            "--data.tokenizer", str(self.out / "tokenizer"),
        ])  # fmt: skip

    def _recover(self, name: str, base: str) -> None:
        recipe, steps = "demo_recover.toml", self.options.recovery_steps
        self._train(recipe, self.out / name, steps, ["--model.init", str(self.out / base)])

    def _train(self, recipe: str, out: Path, steps: int, more: list[str]) -> None:
        command = [
            "--config", str(RECIPES / recipe), "--job.dump_folder", str(out),
            "--training.steps", str(steps), "--debug.seed", str(self.options.seed), *more,
        ]  # fmt: skip
        self._command("train", command, done=_is_trained(out, steps))

    def _calibrate(self) -> None:
        command = [self.out / "dense", self.out / "statistics", "--methods", "drrqr"]
        command += ["--sequences", self.options.sequences, "--seed", self.options.seed]
        done = (self.out / "statistics").is_dir()
        self._command("calibrate", command, done)

    def _prune(self) -> None:
        for name, method in (("pruned", "drrqr"), ("random", "random")):
            command = [self.out / "dense", self.out / name, "--method", method]
            command += ["--ratio", self.options.ratio, "--seed", self.options.seed]
            if method == "drrqr":
                command += ["--stats", self.out / "statistics"]
            self._command("prune", command, done=(self.out / name).is_dir())

    def _export(self) -> None:
        command = [self.out / "recovered", self.out / "export", "--to", "hf"]
        self._command("convert", command, done=(self.out / "export").is_dir())

    def _command(self, name: str, arguments: list[Any], done: bool) -> None:
        """Run one command of slimstate in this process group, unless it is `done`. Collective."""
        from flame.process.distributed import from_rank_zero

        stage, words = self._stage(name, arguments)
        if not from_rank_zero(done):
            stage.call(words)

    def _command_alone(self, name: str, arguments: list[Any], done: bool = False) -> None:
        """Run a command that takes one process, unless it is `done`, while the others wait."""
        from flame.process.distributed import rank

        stage, words = self._stage(name, arguments)
        if rank() == 0 and not done:
            options = stage.parse(words)
            stage.check(options, 1)
            stage.run(options)

    def _stage(self, name: str, arguments: list[Any]) -> tuple[Stage, list[str]]:
        words = [str(argument) for argument in arguments]
        self.commands.append(shlex.join(["slimstate", name, *words]))
        return import_module(COMMANDS[name].module).STAGE, words

    def _evaluate(self) -> None:
        """Held-out perplexity of every model."""
        command = ["--perplexity", "--max-sequences", self.options.heldout]
        file = self.out / PERPLEXITY_FILE
        self._command("eval", [*self._models(MODELS), *command, "--json", file], done=False)

    def _compare(self) -> None:
        """How closely the pruned models follow the dense one, on a part of the held-out text."""
        file = self.out / "fidelity.json"
        rows = min(self.options.heldout, COMPARED)
        command = ["--against", self.out / "dense", "--max-sequences", rows, "--json", file]
        self._command("eval", [*self._models(MODELS[2:]), *command], file.is_file())

    def _analyze(self) -> None:
        command = [self.out / "recovered", self.out / "analysis", "--against", self.out / "dense"]
        done = (self.out / "analysis").is_dir()
        self._command("analyze", [*command, *ANALYSIS], done)

    def _decode(self) -> None:
        """How fast every model decodes."""
        file = self.out / DECODING_FILE
        command = [*DECODING, "--seed", self.options.seed, "--json", file]
        self._command_alone("bench", [*self._models(MODELS), *command], file.is_file())

    def _bench(self) -> None:
        """Size and speed of the recovered model beside the dense one."""
        file = self.out / "bench.json"
        command = [self.out / "recovered", "--against", self.out / "dense", *BENCH, "--json", file]
        self._command_alone("bench", command, file.is_file())

    def _models(self, names: tuple[str, ...]) -> list[Path]:
        return [self.out / name for name in names]

    def _write_summary(self) -> None:
        from flame.process.distributed import world_size

        measured = read_object(self.out / PERPLEXITY_FILE)["models"]
        rows = {
            name: {key: measured[str(self.out / name)][key] for key in SCORES} for name in MODELS
        }
        (speed,) = (
            m for m in read_object(self.out / DECODING_FILE)["measures"] if m["name"] == "decode"
        )
        for name, row in rows.items():
            row["decode_tokens_per_second"] = speed["values"][name]["median"]
        self.seconds["total"] = sum(v for k, v in self.seconds.items() if k != "total")
        content = {
            **rows,
            "world_size": world_size(),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "commands": self.commands,
            "seed": self.options.seed,
            "options": _plain_options(self.options),
        }
        summary = enveloped("demo", command_line("demo", self.options), content)
        write_result(self.out / SUMMARY_FILE, summary)


def _is_finished(options: Options) -> bool:
    files = (options.out / SUMMARY_FILE, options.out / REPORT_FILE)
    return not options.overwrite and all(file.is_file() for file in files)


def _print_summary(folder: Path) -> None:
    from launch.reporting.tables import summary_table

    summary = read_object(folder / SUMMARY_FILE)
    print(summary_table({name: summary[name] for name in MODELS}).text())
    print(f"\n{folder / REPORT_FILE} shows it; {folder / SUMMARY_FILE} has the numbers")


def _check_same_demo(options: Options) -> None:
    """Refuse to go on in a folder that was begun with other options."""
    begun = options.out / "options.json"
    if options.overwrite or not begun.is_file():
        if options.out.is_dir() and any(options.out.iterdir()) and not begun.is_file():
            raise UserError(f"{options.out} is not empty and no demo: choose another --out")
        return
    if read_object(begun) != _plain_options(options):
        raise UserError(
            f"{options.out} was begun with other options: choose another --out, or --overwrite"
        )


def _prepare_folder(options: Options) -> None:
    if options.overwrite:
        shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_object(options.out / "options.json", _plain_options(options))


def _plain_options(options: Options) -> dict[str, Any]:
    return {k: v for k, v in asdict(options).items() if k not in ("out", "overwrite")}


def _read_times(folder: Path) -> dict[str, float]:
    return read_object_if_any(folder / TIMES_FILE)


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
