"""Stages that stream hold a few tensors: real files, real processes, resident memory."""

from pathlib import Path

import pytest

from benchmarks.memory import started
from benchmarks.memory_formulas import Sizes, bounds
from benchmarks.memory_stages import MODELS, TOKENS, write_text

STREAMING = ("plan, by weights", "plan with the repair", "apply", "convert to dcp", "convert to hf")


@pytest.mark.slow
def test_streaming_stages_stay_below_their_bound_and_the_model(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    sizes = Sizes(MODELS["dense"])
    bound = bounds(sizes, 2, TOKENS, width=4)
    found = started("dense", 2, tmp_path)
    for stage in STREAMING:
        assert found[stage][0] < bound[stage] < sizes.stored, stage
