"""Stage `demo`: pretrain, prune, recover and evaluate a small model on this machine.

The corpus is the running interpreter's standard library, so nothing is downloaded. Each step is a
command that a user runs, called in one process group; a step whose output is there is skipped.
"""

import json
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
from flame.storage.json_file import read_object, read_object_if_any
from flame.versions import versions

RECIPES = Path(__file__).parent / "recipes"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
TIMES_FILE = "seconds.json"
VOCABULARY = 4096

EVALUATED = {
    "dense": "dense",
    "dense_continued": "dense_continued",
    "pruned": "pruned",
    "random": "random",
    "recovered": "recovered",
}
"""Rows of the summary and the folders of their models."""

DECODING = {"batch_size": 8, "length": 48, "prompt_length": 16}
BENCH = (
    "--lengths", "512", "--batch-sizes", "1", "--decode-length", "16", "--train-batch", "4",
    "--train-length", "256", "--repeats", "3",
)  # fmt: skip
ANALYSIS = ("--length", "512", "--sequences", "2")
COMPARED = 16
"""Held-out sequences of the comparison with the dense model, at most."""

SPECTRUM_TOKENS = 1024
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
        rows = self._step("evaluate", self._evaluate)
        self._step("compare", self._compare)
        self._step("analyze", self._analyze)
        if rank() == 0:
            self._measure_decoding(rows)
            self._bench()
            self._write(rows)

    def _step(self, name: str, action: Callable[[], Any]) -> Any:
        from flame.process.distributed import barrier, rank

        if rank() == 0:
            print(f"== {name}", flush=True)
        begin = time.perf_counter()
        result = action()
        barrier()
        # A step that was skipped keeps the time of the run that did it.
        self.seconds[name] = max(time.perf_counter() - begin, self.seconds.get(name, 0.0))
        if rank() == 0:
            (self.out / TIMES_FILE).write_text(json.dumps(self.seconds, indent=1))
        return result

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
        self._command("train", "flame.train", command, done=_is_trained(out, steps))

    def _calibrate(self) -> None:
        command = [self.out / "dense", self.out / "statistics", "--methods", "drrqr"]
        command += ["--sequences", self.options.sequences, "--seed", self.options.seed]
        done = (self.out / "statistics").is_dir()
        self._command("calibrate", "pruning.calibrate", command, done)

    def _prune(self) -> None:
        for name, method in (("pruned", "drrqr"), ("random", "random")):
            command = [self.out / "dense", self.out / name, "--method", method]
            command += ["--ratio", self.options.ratio, "--seed", self.options.seed]
            if method == "drrqr":
                command += ["--stats", self.out / "statistics"]
            self._command("prune", "pruning.prune", command, done=(self.out / name).is_dir())

    def _export(self) -> None:
        command = [self.out / "recovered", self.out / "export", "--to", "hf"]
        self._command("convert", "flame.convert", command, done=(self.out / "export").is_dir())

    def _command(self, name: str, module: str, arguments: list[Any], done: bool) -> None:
        """Run one command of slimstate in this process group, unless it is `done`."""
        from flame.process.distributed import from_rank_zero

        words = [str(argument) for argument in arguments]
        self.commands.append(shlex.join(["slimstate", name, *words]))
        if from_rank_zero(done):
            return
        import_module(module).STAGE.call(words)

    def _evaluate(self) -> dict[str, dict[str, Any]]:
        """Held-out perplexity of every model, by row name. Collective."""
        from launch.evaluation.heldout_text import HeldoutOptions
        from launch.evaluation.perplexity import evaluate_perplexity

        text = HeldoutOptions(max_sequences=self.options.heldout)
        self.commands.append(
            f"slimstate eval {self.out}/MODEL --perplexity --max-sequences {self.options.heldout}"
        )
        rows = {}
        for name, folder in EVALUATED.items():
            result = evaluate_perplexity(str(self.out / folder), text)
            rows[name] = {
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
                "parameters": result.parameters,
                "state_bytes": result.state_bytes,
            }
        return rows

    def _compare(self) -> None:
        """How closely the pruned models follow the dense one, on a part of the held-out text."""
        file = self.out / "fidelity.json"
        models = [self.out / name for name in ("pruned", "random", "recovered")]
        rows = min(self.options.heldout, COMPARED)
        command = [*models, "--against", self.out / "dense", "--max-sequences", rows]
        self._command("eval", "launch.evaluate", [*command, "--json", file], file.is_file())

    def _analyze(self) -> None:
        command = [self.out / "recovered", self.out / "analysis", "--against", self.out / "dense"]
        done = (self.out / "analysis").is_dir()
        self._command("analyze", "launch.analyze", [*command, *ANALYSIS], done)

    def _bench(self) -> None:
        """Size and speed of the recovered model beside the dense one. On one process."""
        from launch import bench

        begin = time.perf_counter()
        file = self.out / "bench.json"
        words = [str(self.out / "recovered"), "--against", str(self.out / "dense"), *BENCH]
        words += ["--json", str(file), "--overwrite"]
        self.commands.append(shlex.join(["slimstate", "bench", *words]))
        options = bench.STAGE.parse(words)
        bench.check(options)
        bench.run(options)
        self.seconds["bench"] = time.perf_counter() - begin

    def _measure_decoding(self, rows: dict[str, dict[str, Any]]) -> None:
        from flame.checkpoint.load import load_model
        from flame.checkpoint.reference import resolve
        from flame.process.distributed import device_type
        from launch.speed.decoding import decode_speeds

        begin = time.perf_counter()
        models = {
            name: load_model(resolve(str(self.out / folder)), device=device_type())
            for name, folder in EVALUATED.items()
        }
        speeds = decode_speeds(models, **DECODING, seed=self.options.seed)
        for name, speed in speeds.items():
            rows[name]["decode_tokens_per_second"] = speed
        self.seconds["decode"] = time.perf_counter() - begin

    def _write(self, rows: dict[str, dict[str, Any]]) -> None:
        from flame.process.atomic_output import replacing_file
        from flame.process.distributed import world_size

        self.seconds["total"] = sum(v for k, v in self.seconds.items() if k != "total")
        summary = {
            **rows,
            "world_size": world_size(),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "commands": self.commands,
            "versions": versions(),
            "seed": self.options.seed,
            "decoding": DECODING,
            "options": _plain_options(self.options),
        }
        self._report(rows)
        # Written last: it says that the demo is finished.
        with replacing_file(self.out / SUMMARY_FILE, overwrite=True) as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")
        _print_summary(self.out)

    def _report(self, rows: dict[str, dict[str, Any]]) -> None:
        from dataclasses import replace

        from flame.process.distributed import world_size
        from launch.reporting.collect import collect
        from launch.reporting.page import write_report

        found = collect(
            [self.out], "slimstate demo: half the key channels of a small GatedDeltaNet"
        )
        data = replace(
            found,
            rows=rows,
            spectra=self._spectra(),
            seconds=self.seconds,
            commands=self.commands,
            versions=versions(),
            facts={
                "corpus": "Python's standard library",
                "held-out sequences": self.options.heldout,
                **{f"decoding, {name}": value for name, value in DECODING.items()},
            },
            world_size=world_size(),
            seed=self.options.seed,
        )
        write_report(self.out / REPORT_FILE, data, overwrite=True)

    def _spectra(self) -> dict[str, Any]:
        from flame.checkpoint.load import load_model
        from flame.checkpoint.reference import resolve
        from flame.data.config import DataConfig
        from flame.data.heldout import heldout_sequences
        from flame.data.tokenizer import load_tokenizer
        from flame.process.distributed import local_device
        from launch.ranks.spectra import state_spectra

        config = DataConfig(dataset="python-stdlib", varlen=False)
        tokenizer = load_tokenizer(str(self.out / "tokenizer"))
        (inputs, _, _), *_ = heldout_sequences(config, tokenizer, SPECTRUM_TOKENS, 1)
        spectra = {}
        for name in ("dense", "pruned", "recovered"):
            model = load_model(resolve(str(self.out / EVALUATED[name])))
            spectra[name] = state_spectra(
                model.to(local_device()), inputs["input"].to(local_device())
            )
        return spectra


def _is_finished(options: Options) -> bool:
    files = (options.out / SUMMARY_FILE, options.out / REPORT_FILE)
    return not options.overwrite and all(file.is_file() for file in files)


def _print_summary(folder: Path) -> None:
    from launch.reporting.tables import summary_table

    summary = read_object(folder / SUMMARY_FILE)
    print(summary_table({name: summary[name] for name in EVALUATED}).text())
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
    (options.out / "options.json").write_text(json.dumps(_plain_options(options), indent=1))


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
