"""A step that torchtitan wrote goes through every stage as its Hugging Face conversion does."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.checkpoint.dcp_source import DcpSource
from flame.checkpoint.foreign import GivenFiles
from flame.checkpoint.reference import resolve
from tests.distributed import run_distributed
from tests.flame.checkpoint.other_programs import write_titan_run
from tests.flame.jobs import TINY, train_job, write_assets
from tests.pruning.models import tensors_in


def _stage(module: str, *arguments: object) -> None:
    """Check and run a command line in a process of a job."""
    from flame.process.distributed import world_size

    stage = import_module(module).STAGE
    options = stage.parse([str(argument) for argument in arguments])
    stage.check(options, world_size())
    stage.run(options)


def _same(one: Any, other: Any) -> bool:
    first, second = tensors_in(one), tensors_in(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.slow
def test_every_stage_takes_a_step_of_torchtitan(tmp_path: Path) -> None:
    assets = write_assets(tmp_path)
    run_distributed(write_titan_run, 2, tmp_path / "titan", TINY)
    step, tokenizer = tmp_path / "titan" / "checkpoint" / "step-4", assets / "tokenizer"
    given = ["--model-config", assets / "config.json", "--model-tokenizer", tokenizer]
    run_distributed(_stage, 1, "flame.convert", step, tmp_path / "hf", "--to", "hf", *given)
    files = GivenFiles(assets / "config.json", tokenizer)
    assert _same(files.resolve(step).source(), resolve(tmp_path / "hf").source())

    text = ["--data", assets / "text.jsonl", "--sequences", 4, "--seq-len", 64]
    how = ["--method", "drrqr", "--ratio", 0.5, "--multiple-of", 8, *text]
    run_distributed(_stage, 2, "pruning.prune", step, tmp_path / "one", *how, *given)
    run_distributed(_stage, 2, "pruning.prune", tmp_path / "hf", tmp_path / "other", *how)
    assert _same(resolve(tmp_path / "one").source(), resolve(tmp_path / "other").source())
    assert (tmp_path / "one" / "tokenizer.json").is_file()
    assert resolve(tmp_path / "one").weights.name == "step-0"

    figures = []
    for model, options in ((step, given), (tmp_path / "hf", [])):
        file = tmp_path / f"{len(figures)}.json"
        measure = ["--perplexity", assets / "text.jsonl", "--seq-len", 64, "--json", file]
        run_distributed(_stage, 1, "launch.evaluate", model, *measure, *options)
        record = json.loads(file.read_text())
        figures.append((record["perplexity"], record["tokens"]))
    assert figures[0] == figures[1]

    runs = []
    for model in (step, tmp_path / "hf"):
        run = tmp_path / f"run-{len(runs)}"
        run_distributed(train_job, 1, assets, run, model__init=str(model), training__steps=2)
        runs.append(DcpSource(run / "checkpoint" / "step-2"))
    assert _same(*runs)
