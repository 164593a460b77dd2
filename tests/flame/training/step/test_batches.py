"""Data that one rank cannot read, or has too little of, end all after a whole step is saved."""

import json
from pathlib import Path
from typing import Any

import pytest

from flame.errors import UserError
from tests.distributed import run_distributed
from tests.flame.jobs import largest_difference, losses_of, train_job


def said(assets: Path, out: Path, **overrides: Any) -> str:
    """Train; return the error."""
    try:
        train_job(assets, out, **overrides)
    except UserError as error:
        return str(error)
    return ""


def write_files(folder: Path, bad: int) -> Path:
    """A file for each of four virtual shards, the last with a number in the place of a text."""
    folder.mkdir()
    for shard in range(4):
        rows = [{"text": f"x = {i * shard}\n"} for i in range(200)]
        lines = [json.dumps(row) for row in rows]
        if shard == 3:
            lines[bad] = '{"text": 7}'
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.timeout(600)
def test_one_bad_row_too_many_saves_the_step_before_it(assets: Path, tmp_path: Path) -> None:
    data = {
        "data__dataset": str(write_files(tmp_path / "text", 70)),
        "data__streaming": True,
        "checkpoint__interval": 100,
    }
    run, whole = tmp_path / "run", tmp_path / "whole"
    errors = run_distributed(said, 2, assets, run, data__max_bad_rows=0, **data)
    assert errors[0] == errors[1]
    assert "more than 0 rows are no text; the first: column 'text' holds int" in errors[0]
    (step,) = (run / "checkpoint").iterdir()
    number = int(step.name.removeprefix("step-"))
    assert 1 <= number < 6 and f"step {number} is saved" in errors[0]
    for folder in (run, whole):
        assert run_distributed(said, 2, assets, folder, data__max_bad_rows=1, **data) == ["", ""]
    assert losses_of(run) == pytest.approx(losses_of(whole), rel=1e-6)
    final = "checkpoint/step-6"
    assert largest_difference(run / final, whole / final) < 1e-6


def test_data_that_end_on_one_rank_end_all_and_leave_the_position_of_what_was_trained(
    assets: Path, tmp_path: Path
) -> None:
    """Documents are dealt unevenly; a step has four micro-batches, some of which are still read."""
    rows = [json.dumps({"text": f"x = {i}\n" * (9 if i % 4 else 5)}) for i in range(150)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    options = {
        "data__dataset": str(tmp_path / "text.jsonl"),
        "data__repeat": False,
        "data__shuffle": False,
        "training__local_batch_size": 1,
        "training__steps": 50,
        "lr_scheduler__total_steps": 50,
        "checkpoint__interval": 100,
    }
    ends = {}
    for size in (1, 2):
        run = tmp_path / f"on{size}"
        assert run_distributed(said, size, assets, run, **options) == [""] * size
        (step,) = (run / "checkpoint").iterdir()
        ends[size] = int(step.name.removeprefix("step-"))
        position = json.loads((step / "dataloader.json").read_text())
        assert position["next_sequence"] == 8 * ends[size]
    assert ends[1] == ends[2] > 1
