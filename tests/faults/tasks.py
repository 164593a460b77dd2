"""What the fault tests run, each a function that a person's command line would start again as is.

Every task reads the folder `inputs` and writes below `place/work` alone.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import UserError

SMALL: dict[str, Any] = {
    "model_type": "gated_deltanet",
    "architectures": ["GatedDeltaNetForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "head_dim": 8,
    "expand_v": 1.5,
    "vocab_size": 300,
    "hidden_ratio": 2,
    "max_position_embeddings": 256,
}
STEPS = 4
RECIPE: dict[str, Any] = {
    "training__seq_len": 16,
    "training__local_batch_size": 1,
    "training__global_batch_size": 2,
    "training__steps": STEPS,
    "lr_scheduler__total_steps": STEPS,
    "checkpoint__interval": 1,
}
LORA: dict[str, Any] = {"lora__rank": 2, "training__steps": 1}


@dataclass(frozen=True)
class Task:
    """A command, and what it leaves."""

    run: Callable[[Path, Path], None]
    """Called with `inputs` and `place` on every rank."""
    output: str
    """The file or folder below `place/work` that it writes whole or not at all."""
    world_size: int = 1
    make: Callable[[Path], None] | None = None
    """Adds to `inputs` what this task alone needs."""
    prepare: Callable[[Path, Path], None] | None = None
    """Copies to `place` what the task finds there."""


def make_inputs(inputs: Path) -> None:
    """A trained model, and a plan to prune it."""
    from pruning import plan
    from tests.flame.jobs import train_job, write_assets

    assets = inputs / "assets"
    assets.mkdir()
    write_assets(assets)
    (assets / "config.json").write_text(json.dumps(SMALL))
    train_job(assets, inputs / "dense", **RECIPE)
    budget = ["--method", "l1", "--ratio", "0.5", "--paper"]
    plan.run(plan.STAGE.parse([str(inputs / "dense"), str(inputs / "plan.json"), *budget]))


def train(inputs: Path, place: Path) -> None:
    """Save each step, keep all of them."""
    _train(inputs, place, checkpoint__keep_latest_k=0)


def train_in_background(inputs: Path, place: Path) -> None:
    """Save steps in the background, keep two."""
    _train(inputs, place, checkpoint__keep_latest_k=2, checkpoint__async_mode="async")


def merge(inputs: Path, place: Path) -> None:
    """Start a LoRA run that is at its last step: what is left to do is to merge it."""
    _train_adapters(inputs, place / "work" / "run")


def make_adapters(inputs: Path) -> None:
    """A LoRA run of the model, not merged."""
    _train_adapters(inputs, inputs / "adapted")
    shutil.rmtree(inputs / "adapted" / "merged")


def copy_adapters(inputs: Path, place: Path) -> None:
    shutil.copytree(inputs / "adapted", place / "work" / "run")


def calibrate(inputs: Path, place: Path) -> None:
    """Calibrate with resume points, and go on from one if it is there."""
    from pruning import calibrate as stage

    stats = place / "work" / "stats"
    words = [str(inputs / "dense"), str(stats), "--methods", "drrqr,taylor"]
    words += ["--sequences", "6", "--seq-len", "16", "--save-every", "2"]
    if stats.exists():
        from pruning.calibration.stats_file import read_meta

        if read_meta(stats).is_complete:
            if os.environ["RANK"] == "0":
                with contextlib.suppress(UserError):
                    stage.check(stage.STAGE.parse([*words, "--resume"]))
            return
        words.append("--resume")
    options = stage.STAGE.parse(words)
    stage.check(options, int(os.environ["WORLD_SIZE"]))
    stage.run(options)


def apply(to: str) -> Callable[[Path, Path], None]:
    def run(inputs: Path, place: Path) -> None:
        from pruning import apply as stage

        out = str(place / "work" / "out")
        words = [str(inputs / "dense"), str(inputs / "plan.json"), out]
        options = stage.STAGE.parse([*words, "--to", to, "--overwrite"])
        stage.check(options)
        stage.run(options)

    return run


def convert(to: str) -> Callable[[Path, Path], None]:
    def run(inputs: Path, place: Path) -> None:
        from flame import convert as stage

        out = str(place / "work" / "out")
        options = stage.STAGE.parse([str(inputs / "dense"), out, "--to", to, "--overwrite"])
        stage.check(options)
        stage.run(options)

    return run


TASKS = {
    "train": Task(train, "run", world_size=2),
    "train in the background": Task(train_in_background, "run", world_size=2),
    "calibrate": Task(calibrate, "stats", world_size=2),
    "apply to dcp": Task(apply("dcp"), "out"),
    "apply to hf": Task(apply("hf"), "out"),
    "convert to dcp": Task(convert("dcp"), "out"),
    "convert to hf": Task(convert("hf"), "out"),
    "merge": Task(merge, "run/merged", make=make_adapters, prepare=copy_adapters),
}


def run_task(name: str, inputs: Path, place: Path) -> None:
    """What a job's ranks run."""
    with contextlib.chdir(place / "tmp"):
        TASKS[name].run(inputs, place)


def _train(inputs: Path, place: Path, **options: Any) -> None:
    from tests.flame.jobs import train_job

    train_job(inputs / "assets", place / "work" / "run", **RECIPE, **options)


def _train_adapters(inputs: Path, run: Path) -> None:
    from tests.flame.jobs import train_job

    options = {**RECIPE, **LORA, "model__init": str(inputs / "dense")}
    train_job(inputs / "assets", run, **options)
