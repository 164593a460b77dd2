"""`slimstate sweep --config`: what a TOML says, what is refused, and a sweep that grows."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from flame.errors import UserError
from launch import sweep
from launch.evaluation.heldout_text import spread_evenly
from launch.sweeping.comparison.figures import ALL
from tests.distributed import run_distributed
from tests.launch.test_sweep import RECIPE
from tests.pruning.models import GATED_DELTANET, weights, write_run, write_text

SWEEP = """
out = "{root}/sweep"
methods = ["l1", "random"]
ratios = [0.25, 0.5]
seeds = [0, 1]
reference = "random"
multiple-of = 8
max_sequences = 24

[[models]]
model = "{root}/zero"
group = "toy"

[[models]]
model = "{root}/one"
group = "toy"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweeps")
    write_text(root)
    recipe = RECIPE.format(root=root, steps=2)
    for seed, name in enumerate(("zero", "one")):
        write_run(root / name, GATED_DELTANET, weights(GATED_DELTANET, seed), recipe=recipe)
    (root / "recover.toml").write_text(recipe)
    return root


def checked(root: Path, folder: Path, old: str, new: str, *words: str) -> Any:
    """The options of a sweep whose TOML has `new` for `old`, after their check."""
    text = SWEEP.format(root=root)
    assert old in text
    (folder / "sweep.toml").write_text(text.replace(old, new))
    options = sweep.STAGE.parse(["--config", str(folder / "sweep.toml"), *words])
    sweep.check(options, 1)
    return options


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("methods =", "method =", "sweep.toml: unknown key method: did you mean methods?"),
        ("group =", "kind =", "[[models]]: unknown key kind: choose from model, name, group"),
        ("/one", "/two", "/two: no such folder"),
        ("/one", "/zero", "are both called zero: give one of them another name"),
        ('"random"\nmul', '"taylor"\nmul', "--reference: taylor is not in the sweep: choose from"),
        ("ratios = [0.25, 0.5]", "ratios = []", "ratios is a value or a list of values, not []"),
        ("seeds = [0, 1]", "seeds = ['x']", "--seeds: x is not a whole number"),
        ("seeds = [0, 1]", "overwrite = 1", "overwrite is true or false, not 1"),
        ("out =", "json =", "sweep.toml has no out"),
        ("[[models]]\nmodel", "[[models]]\nname", "names no model: add model"),
        ('group = "toy"', "group = 3", "[[models]]: group is text, not 3"),
        ('group = "toy"', 'name = "../up"', "'../up' cannot name a folder"),
        ("seeds = [0, 1]", "recover_ratios = [0.5]", "--recover-ratios is for a recovery"),
        ("seeds = [0, 1]", "models = 3\n[x", "is not TOML"),
    ],
)
def test_one_line_says_what_is_wrong(
    root: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        checked(root, tmp_path, old, new)
    assert "\n" not in str(error.value) and not (root / "sweep").exists()


def test_words_of_the_command_line_come_after_those_of_the_file(root: Path, tmp_path: Path) -> None:
    words = ("--ratios", "0.5", "--recover", str(root / "recover.toml"), "--recover-ratios", "0.5")
    options = checked(root, tmp_path, "seeds = [0, 1]", "dtype = 'float32'", *words)
    assert [member.out for member in options.members] == [root / "sweep/zero", root / "sweep/one"]
    assert options.ratios == ("0.5",) and options.reference == ("random",)
    first = options.members[0]
    assert (first.model, first.text.spread, first.dtype) == (str(root / "zero"), True, "float32")
    assert set(first.wanted.values()) == {("before",), ("before", "recovered")}
    with pytest.raises(UserError, match="--recover-ratios: 0.25 is not in the sweep"):
        checked(root, tmp_path, "seeds", "seeds", *words[:-1], "0.25")


def test_places_that_are_taken_are_refused(root: Path, tmp_path: Path) -> None:
    out = f'out = "{root}/sweep"'
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("")
    with pytest.raises(UserError, match="is not empty and no sweep"):
        checked(root, tmp_path, out, f'out = "{tmp_path}/mine"')
    (tmp_path / "mine" / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="is the sweep of one model"):
        checked(root, tmp_path, out, f'out = "{tmp_path}/mine"')


def run_alone(words: list[str]) -> None:
    """A sweep in a process of the tests' pool, as torchrun would start it."""
    import torch.distributed as dist

    dist.destroy_process_group()
    options = sweep.STAGE.parse(words)
    sweep.check(options, int(os.environ["WORLD_SIZE"]))
    sweep.run(options)


@pytest.mark.slow
def test_a_sweep_grows_and_keeps_what_was_measured(root: Path, tmp_path: Path) -> None:
    text = SWEEP.format(root=root).replace(f"{root}/sweep", f"{tmp_path}/sweep")
    file, out = tmp_path / "sweep.toml", tmp_path / "sweep"
    _, first_model, second_model = text.split("[[models]]")
    file.write_text(text.replace(f"[[models]]{second_model}", ""))
    run_distributed(run_alone, 1, ["--config", str(file)])
    (drawn, l1) = _rows(out, "random", "0.5"), _rows(out, "l1", "0.5")
    assert [row["group"] for row in (*drawn, *l1)] == ["toy", "toy"]
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/points/*.json")}
    assert len(stamps) == 1 + 2 + 4
    # Another method, another model, and a recovery at one ratio.
    more = f'recover = "{root}/recover.toml"\nrecover_ratios = [0.5]\ndense_continued = true\n'
    file.write_text(more + text.replace('["l1", ', '["l1", "l2", '))
    run_distributed(run_alone, 2, ["--config", str(file)])
    points = [json.loads(path.read_text()) for path in out.glob("*/points/*.json")]
    assert len(points) == 2 * (2 + 2 + 2 + 4)
    kept = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns == stamp]
    assert {path.stem.rpartition("=")[2] for path in kept} == {"dense", "0.25"}
    recovered = [point["name"] for point in points if "recovered" in point]
    assert len(recovered) == 2 * (1 + 1 + 1 + 2) and not any("0.25" in n for n in recovered)
    _check_table(out)


def _rows(out: Path, method: str, ratio: str) -> list[dict[str, Any]]:
    rows = json.loads((out / "results.json").read_text())["comparison"]
    return [row for row in rows if (row["method"], row["ratio"]) == (method, ratio)]


def _check_table(out: Path) -> None:
    """Figures of both models are the means of the records, and stand in the table."""
    (row, after) = _rows(out, "l1", "0.5")
    names = ("zero", "one")

    def record(model: str, name: str) -> dict[str, Any]:
        return json.loads((out / model / "points" / f"{name}.json").read_text())

    kl = [record(model, "l1@key=0.5")["before"]["kl"] for model in names]
    assert row["kl"] == pytest.approx(sum(kl) / 2) and min(kl) > 0
    assert record("zero", "dense")["before"]["kl"] == pytest.approx(0, abs=1e-7)
    rises = [
        (sum(pruned["losses"]) - sum(dense["losses"])) / sum(dense["tokens"])
        for model in names
        for pruned in [record(model, "l1@key=0.5")["before"]["documents"]]
        for dense in [record(model, "dense")["before"]["documents"]]
    ]
    assert row["rise"] == pytest.approx(sum(rises) / 2)
    assert (row["models"], row["group"], row["reference"]) == (2, "toy", "random")
    assert (row["stage"], after["stage"]) == ("before", "recovered")
    assert ALL not in (out / "results.md").read_text()
    for file in ("results.md", "results.tex", "sweep.html"):
        assert f"{row['kl']:.4f}" in (out / file).read_text()


def test_rows_are_spread_over_all_of_a_text() -> None:
    assert spread_evenly(range(5), 9) == [0, 1, 2, 3, 4] and spread_evenly([], 3) == []
    for total in (10, 96, 646, 1000):
        found = spread_evenly(iter(range(total)), 10)
        gaps = [after - before for before, after in zip(found, found[1:], strict=False)]
        assert len(found) == 10 and max(gaps) <= 2 * min(gaps) and found[-1] >= 0.8 * total
