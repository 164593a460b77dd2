"""The costs of a job by formula (docs/many-nodes.md), held to what is counted."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.cost_counts import count, write_assets
from benchmarks.cost_model import compared, saved, together
from benchmarks.simulated_world import rank_of
from tests.distributed import run_distributed

EXACT = ("fresh start", "step")


@pytest.fixture(scope="module")
def small_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_assets(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_real_jobs_cost_what_the_formulas_say(small_job: Path, ranks: int) -> None:
    found = run_distributed(count, ranks, small_job)
    counts, sizes = found[0]
    read = together([of_rank for of_rank, _ in found])
    for phase, what, formula, counted in compared(ranks, counts, sizes, read):
        if phase in EXACT:
            assert counted == formula, f"{phase}: {what}"
        elif what.startswith("least"):
            assert 0.98 * formula < counted
        elif what.startswith("most"):
            assert counted < 1.02 * formula
        else:
            assert counted == pytest.approx(formula, rel=0.06), f"{phase}: {what}"


def test_a_step_of_a_simulated_world_costs_what_the_formulas_say(small_job: Path) -> None:
    with rank_of(0, 64, 8):
        counts, _ = count(small_job, is_real=False)
    rows = list(compared(64, counts, {}, Counter()))
    assert {phase for phase, *_ in rows} == set(EXACT)
    assert [(counted, what) for _, what, _, counted in rows] == [(f, w) for _, w, f, _ in rows]


def test_a_node_of_a_simulated_world_reads_what_the_formula_says() -> None:
    row = saved(64, 8)
    assert row["resume"] == pytest.approx(row["formula"], rel=0.05)
    assert row["resume"] < 1.2
