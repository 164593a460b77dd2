"""Methods beside a reference: ratios, what is sure, and models averaged."""

from typing import Any

import numpy as np
import pytest

from launch.evaluation.intervals import DocumentLosses
from launch.sweeping.comparison.figures import ALL, Key, Measured, ModelPoints, compare
from launch.sweeping.comparison.page import charts, page, verdict
from launch.sweeping.comparison.tables import every_row, grids
from tests.launch.reporting.test_page import Nesting

TOKENS = [100 + number for number in range(20)]
HARD = np.random.default_rng(0).uniform(200, 400, len(TOKENS))


def model(name: str, group: str, **rises: float) -> ModelPoints:
    """A model whose methods raise the loss of every document by `rises` nats a token, about."""
    noise = np.random.default_rng(len(name)).normal(0, 0.002, len(TOKENS))
    tokens = np.array(TOKENS)

    def measured(rise: float) -> Measured:
        losses = HARD + tokens * (rise + noise)
        return Measured(sums(losses), sums(tokens * (abs(rise) + 0.01)))

    points = {
        Key(method, "key", "0.5", False): {"before": measured(rise)}
        for method, rise in rises.items()
    }
    return ModelPoints(name, group, points, dict.fromkeys(points, 0.5), {"before": sums(HARD)})


def sums(losses: Any) -> DocumentLosses:
    return DocumentLosses(list(losses), TOKENS)


def row(rows: list[dict[str, Any]], group: str, method: str) -> dict[str, Any]:
    (found,) = (each for each in rows if (each["group"], each["method"]) == (group, method))
    return found


def test_ratios_and_counts_are_those_of_the_figures() -> None:
    models = [
        model("a-0", "a", paper=0.2, ours=0.05, odd=0.1, none=0.2001),
        model("a-1", "a", paper=0.4, ours=0.10, odd=0.5, none=0.3999),
        model("b", "b", paper=0.1, ours=0.04, odd=0.05, none=0.1),
    ]
    rows = compare(models, ("paper",))
    ours = row(rows, "a", "ours")
    # The noise of a model is in both of its methods, and adds the same to both rises.
    assert ours["rise"] == pytest.approx(0.075, abs=0.002) and ours["models"] == 2
    assert ours["rise_low"] < ours["rise"] < ours["rise_high"]
    assert ours["rise_ratio"] == pytest.approx(0.25, abs=0.01)
    assert ours["rise_ratio_low"] < 0.25 < ours["rise_ratio_high"]
    assert ours["rise_spread"] == pytest.approx(0.05 / 2**0.5, rel=0.1)
    assert ours["kl_ratio"] == pytest.approx((0.06 + 0.11) / (0.21 + 0.41))
    assert (ours["rise_ahead"], ours["rise_behind"], ours["rise_sign"]) == (2, 0, -1)
    assert ours["rise_worst"] == pytest.approx(0.25, abs=0.01)
    odd = row(rows, ALL, "odd")
    assert (odd["rise_ahead"], odd["rise_behind"], odd["models"]) == (2, 1, 3)
    assert odd["rise_worst"] == pytest.approx(1.25, abs=0.02)
    assert row(rows, ALL, "paper").get("reference") is None
    assert [each["method"] for each in rows if each["group"] == "b"] == [
        "paper", "ours", "odd", "none",
    ]  # fmt: skip


def test_a_rise_that_may_be_chance_is_no_measure() -> None:
    rows = compare([model("a", "a", paper=0.0, ours=0.05)], ("missing", "paper"))
    ours = row(rows, "a", "ours")
    assert ours["reference"] == "paper" and ours["rise_ratio"] is None
    assert ours["rise_sign"] == 1 and ours["kl_ratio"] == pytest.approx(6)


def test_documents_too_few_give_figures_without_intervals() -> None:
    whole = model("a", "a", paper=0.2, ours=0.1)

    def few(found: DocumentLosses) -> DocumentLosses:
        return DocumentLosses(found.losses[:3], found.tokens[:3])

    points = {
        key: {s: Measured(few(m.losses), few(m.divergences)) for s, m in stages.items()}
        for key, stages in whole.points.items()
    }
    controls = {stage: few(losses) for stage, losses in whole.controls.items()}
    (_, ours) = compare([ModelPoints("a", "a", points, {}, controls)], ("paper",))
    assert ours["rise"] == pytest.approx(0.1, abs=0.01)
    assert ours["rise_low"] is None and ours["rise_sign"] == 0


def test_page_and_tables_hold_the_figures() -> None:
    models = [model("a", "one", paper=0.2, ours=0.05), model("b", "two", paper=0.2, ours=0.06)]
    rows = compare(models, ("paper",))
    results = {
        "title": "a sweep",
        "command": "slimstate sweep --config S",
        "versions": {},
        "facts": {},
        "models": [{"name": m.name, "group": m.group, "model": m.name} for m in models],
        "perplexity": {m.name: {"before": 5.0, "recovered": None} for m in models},
        "reference": ["paper"],
        "comparison": rows,
    }
    text = page(results)
    parser = Nesting()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and parser.links == [] and "nan" not in text
    assert "With 50 % of the key channels removed, ours is nearest to the dense model" in text
    assert verdict(rows).endswith("of paper's (ahead in 2 of 2 models).")
    first = next(iter(grids(rows)))
    assert first.heading == f"{ALL}: rise of the loss, nats a token"
    assert [line["method"] for line in first.table.rows] == ["paper", "ours"]
    assert "±" in first.table.rows[1]["0.5 before"]
    assert every_row(rows).csv().count("\n") == 1 + 3 * 2
    assert list(charts(rows)) == []


def test_a_chart_shows_the_reference_random_and_the_nearest() -> None:
    rises = {f"m{number}": 0.1 + 0.01 * number for number in range(9)}
    whole = model("a", "a", paper=0.9, random=2.0, **rises)
    points = {
        Key(key.method, "key", ratio, False): stages
        for key, stages in whole.points.items()
        for ratio in ("0.5", "0.75")
    }
    removed = {key: float(key.ratio) for key in points}
    rows = compare([ModelPoints("a", "a", points, removed, whole.controls)], ("paper",))
    (panel,) = charts(rows, ("paper",))
    for name in ("paper", "random", "m0", "m4"):
        assert f">{name}<" in panel.picture
    assert ">m5<" not in panel.picture
