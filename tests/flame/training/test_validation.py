"""The loss on held-out text while a run trains."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.flame.jobs import largest_difference, losses_of, scalars_of, train_job


def settings(assets: Path) -> dict[str, Any]:
    return {
        "validation__enable": True,
        "validation__freq": 4,
        "validation__steps": 1,
        "data__heldout": str(assets / "text.jsonl"),
    }


@pytest.fixture(scope="module")
def validated(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run on two processes, and validation beside it."""
    run = tmp_path_factory.mktemp("validated") / "run"
    run_distributed(train_job, 2, assets, run, **settings(assets))
    return run


def test_validation_changes_nothing_of_the_training(two_ranks: Path, validated: Path) -> None:
    final = "checkpoint/step-6"
    assert largest_difference(two_ranks / final, validated / final) == 0.0
    assert losses_of(validated) == losses_of(two_ranks)


def test_it_is_measured_at_the_first_the_last_and_every_nth_step(validated: Path) -> None:
    losses = scalars_of(validated, "validation_metrics/loss")
    assert sorted(losses) == [1, 4, 6]
    assert losses[6] < losses[4] < losses[1] < 6
    assert scalars_of(validated, "validation_metrics/bits_per_byte").keys() == losses.keys()


def evaluated(assets: Path, run: Path) -> tuple[float, float]:
    """The loss and bits per byte that `eval` measures on the rows of the validation."""
    from launch.evaluation.heldout_text import HeldoutOptions
    from launch.evaluation.perplexity import evaluate_perplexity

    text = HeldoutOptions(
        data=str(assets / "text.jsonl"), split="train", seq_len=64, max_sequences=8
    )
    found = evaluate_perplexity(str(run), text)
    return math.log(found.perplexity), found.bits_per_byte


def test_it_is_what_eval_measures(assets: Path, validated: Path) -> None:
    ((loss, bits),) = run_distributed(evaluated, 1, assets, validated)
    curves = ("validation_metrics/loss", "validation_metrics/bits_per_byte")
    logged = [scalars_of(validated, name)[6] for name in curves]
    assert [loss, bits] == pytest.approx(logged, rel=1e-5)


def test_it_does_not_depend_on_the_number_of_processes(
    assets: Path, validated: Path, tmp_path: Path
) -> None:
    """Of all the text too, of which the last round of rows is not for every rank."""
    run_distributed(train_job, 1, assets, tmp_path / "one", **settings(assets))
    one, two = (scalars_of(run, "validation_metrics/loss") for run in (tmp_path / "one", validated))
    for step in (1, 4, 6):
        assert one[step] == pytest.approx(two[step], rel=2e-5)
    whole = settings(assets) | {"validation__steps": -1, "training__steps": 1}
    for size in (1, 2):
        run_distributed(train_job, size, assets, tmp_path / f"all{size}", **whole)
    one, two = (scalars_of(tmp_path / f"all{n}", "validation_metrics/loss") for n in (1, 2))
    assert one[1] == pytest.approx(two[1], rel=1e-6)
