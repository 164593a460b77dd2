"""`apply` streams: its memory does not grow with the model."""

from pathlib import Path

import pytest

from benchmarks.apply import apply_run, write_plan
from benchmarks.checkpoints import write_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dcp", "hf"])
def test_two_gigabytes_take_less_than_one_and_twice_the_largest_tensor(
    form: str, tmp_path: Path
) -> None:
    model, largest = write_checkpoint(tmp_path / "model", 2.0, form)
    write_plan(model, tmp_path / "plan.json")
    run = apply_run(model, tmp_path / "plan.json", tmp_path / "out")
    assert run.peak_bytes < 2**30 + 2 * largest
