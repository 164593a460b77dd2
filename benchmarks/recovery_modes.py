"""The demo's pruned model recovered in every way, on the same tokens, beside the dense model.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.recovery_modes DEMO OUT [--steps 120]

DEMO is a finished folder of `slimstate demo`. LoRA, DoRA, full training and training of the token
mixers alone, each with and without the dense model as teacher, and the dense model trained on for
as long; all by `launch/recipes/demo_recover.toml`, one seed, one learning rate unless `--rate` says
otherwise. A second call trains and measures only what is missing.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flame.errors import UserError, run_stage
from launch.drawing.table import Column, Table

RECIPE = Path(__file__).parents[1] / "launch/recipes/demo_recover.toml"
RESULTS_FILE = "results.json"
COLUMNS = (
    Column("model", "model", align="left"),
    Column("teacher", "teacher", align="left"),
    Column("trained", "trained parameters", ","),
    Column("rate", "learning rate"),
    Column("perplexity", "perplexity", ".2f"),
    Column("bits_per_byte", "bits per byte", ".4f"),
    Column("seconds", "training, s", ".0f"),
)


@dataclass(frozen=True)
class Mode:
    title: str
    base: str
    """Folder of the demo to start from; without options it is only measured."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        return bool(self.options)


ADAPTERS = {"lora.rank": 32}
WAYS: dict[str, dict[str, Any]] = {
    "lora": ADAPTERS,
    "dora": {**ADAPTERS, "lora.dora": True},
    "full": {"lora.rank": 0},
    "partial": {"lora.rank": 0, "trainable.modules": ".attn."},
}
TITLES = {"lora": "LoRA", "dora": "DoRA", "full": "full", "partial": "token mixers alone"}
MODES = {
    "dense": Mode("dense", "dense"),
    "dense-lora": Mode("dense, trained on as long: LoRA", "dense", WAYS["lora"]),
    "dense-full": Mode("dense, trained on as long: full", "dense", WAYS["full"]),
    "pruned": Mode("pruned", "pruned"),
    **{way: Mode(f"pruned, {TITLES[way]}", "pruned", WAYS[way]) for way in WAYS},
    **{
        f"{way}-distilled": Mode(f"pruned, {TITLES[way]}", "pruned", WAYS[way] | {"teacher": True})
        for way in WAYS
    },
}


@dataclass(frozen=True)
class Options:
    demo: Path
    out: Path
    steps: int
    heldout: int
    modes: list[str]
    rate: dict[str, float]
    seed: int

    def rate_of(self, name: str) -> float:
        """The learning rate of a mode: its own, or its way's, or the recipe's."""
        way = name.removesuffix("-distilled")
        return self.rate.get(name, self.rate.get(way, self.rate["all"]))


def parse(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("demo", type=Path, metavar="DEMO")
    add("out", type=Path, metavar="OUT")
    add("--steps", type=int, default=120, help="of 2,048 tokens (default: %(default)s)")
    add("--heldout", type=int, default=128, help="held-out sequences (default: %(default)s)")
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE")
    add("--rate", nargs="+", default=[], metavar="MODE=LR", help="e.g. all=1e-3 full=5e-4")
    add("--seed", type=int, default=0)
    values = vars(parser.parse_args(argv))
    return Options(**{**values, "rate": {"all": 1e-3, **rates(values["rate"])}})


def rates(words: list[str]) -> dict[str, float]:
    """Learning rates of `MODE=LR` words."""
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(f"--rate {word}: write MODE=LR, as full=5e-4") from None
        if name not in (*MODES, "all"):
            raise UserError(f"--rate {word}: choose from all, {', '.join(MODES)}")
    return found


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if the demo is missing, or a count is below 1."""
    from flame.checkpoint.reference import resolve

    for name in ("dense", "pruned"):
        resolve(options.demo / name)
    for name in ("steps", "heldout"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: it must be above 0")


def run(options: Options) -> None:
    """Train and measure what is missing; print the table. Collective."""
    import flame.register  # noqa: F401
    from flame.process.distributed import process_group, rank

    with process_group():
        rows = [row_of(name, options) for name in MODES if name in options.modes]
        if rank() == 0:
            print(Table(COLUMNS, rows).markdown())


def row_of(name: str, options: Options) -> dict[str, Any]:
    """The row of one mode, from the file of results if it is there."""
    from flame.process.distributed import from_rank_zero, rank

    settings = settings_of(name, options)
    known = from_rank_zero(read_results(options.out).get(name))
    if known is not None and known["settings"] == settings:
        return known["row"]
    mode = MODES[name]
    folder = options.demo / mode.base
    row: dict[str, Any] = {"model": mode.title, "teacher": "-", "rate": "-"}
    if mode.is_trained:
        folder = options.out / name
        row["seconds"] = train(name, options)
        row["rate"] = f"{options.rate_of(name):g}"
        row["trained"] = trained_parameters(folder, options.steps)
        row["teacher"] = "dense" if "teacher" in mode.options else "-"
    row |= measure(folder, options.heldout)
    if rank() == 0:
        write_result(options.out, name, {"settings": settings, "row": row})
    return row


def settings_of(name: str, options: Options) -> dict[str, Any]:
    """What a row depends on."""
    return {
        "demo": str(options.demo.resolve()),
        "steps": options.steps,
        "heldout": options.heldout,
        "rate": options.rate_of(name),
        "seed": options.seed,
    }


def train(name: str, options: Options) -> float:
    """Train one mode, or go on where it stopped; seconds that it took. Collective."""
    import time

    from flame import train as stage

    begin = time.perf_counter()
    stage.STAGE.call(words(name, options))
    return time.perf_counter() - begin


def words(name: str, options: Options) -> list[str]:
    """The command line of `slimstate train` for one mode."""
    mode = MODES[name]
    settings = {
        "job.dump_folder": options.out / name,
        "model.init": options.demo / mode.base,
        "training.steps": options.steps,
        "optimizer.lr": options.rate_of(name),
        "debug.seed": options.seed,
        **mode.options,
    }
    if settings.pop("teacher", False):
        settings["distill.teacher"] = options.demo / "dense"
    dora = ["--lora.dora"] if settings.pop("lora.dora", False) else []
    plain = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return ["--config", str(RECIPE), *plain, *dora, "--lora.no-merge"]


def trained_parameters(run_folder: Path, step: int) -> int:
    """Parameters that have optimizer moments in the last step."""
    from math import prod

    from flame.checkpoint.dcp_source import DcpSource
    from flame.checkpoint.steps import step_folder

    source = DcpSource(step_folder(run_folder / "checkpoint", step), everything=True)
    moments = [name for name in source.names() if name.endswith(".exp_avg")]
    return sum(prod(source.info(name).shape) for name in moments)


def measure(folder: Path, sequences: int) -> dict[str, float]:
    """Held-out perplexity and bits per byte. Collective."""
    from launch.evaluation.heldout_text import HeldoutOptions
    from launch.evaluation.perplexity import evaluate_perplexity

    result = evaluate_perplexity(str(folder), HeldoutOptions(max_sequences=sequences))
    return {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}


def read_results(out: Path) -> dict[str, Any]:
    path = out / RESULTS_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def write_result(out: Path, name: str, result: dict[str, Any]) -> None:
    from flame.process.atomic_output import replacing_file

    results = {**read_results(out), name: result}
    out.mkdir(parents=True, exist_ok=True)
    with replacing_file(out / RESULTS_FILE, overwrite=True) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    options = parse()
    check(options)
    run(options)


if __name__ == "__main__":
    run_stage(main)
