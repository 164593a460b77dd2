"""`slimstate sweep`: what its words mean, what it refuses, what it measures, and going on."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.options import words
from launch import sweep
from launch.drawing.sweep_chart import log_ticks
from launch.evaluation.heldout_text import heldout_text
from launch.sweeping.checks import check_points, needing
from launch.sweeping.folder import SweepFolder
from launch.sweeping.measuring import Dense, in_memory
from launch.sweeping.page import page, write_files
from launch.sweeping.points import points
from launch.sweeping.progress import telling
from launch.sweeping.tables import collect_rows, rows_table, sweep_of, without_documents
from launch.sweeping.work import Work
from pruning.methods import METHODS
from pruning.statistics import GateMoments
from tests.distributed import run_distributed
from tests.launch.reporting.test_page import Nesting
from tests.pruning.kda_hybrids import CONFIGS as KDA_HYBRIDS
from tests.pruning.models import GATED_DELTANET, weights, write_run, write_text

RECIPE = """
[data]
dataset = "{root}/text.jsonl"
heldout = "{root}/text.jsonl"
tokenizer = "{root}/tokenizer"
virtual_shards = 4

[training]
seq_len = 32
local_batch_size = 1
global_batch_size = 4
steps = {steps}
"""

MODEL_STEPS, RECOVERY_STEPS = 7, 2
BASE = ["--ratios", "0.25,0.5", "--multiple-of", "8", "--sequences", "3", "--max-sequences", "3"]
SMALL = ["--methods", "drrqr,l1,random", *BASE]
PLANS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 32 key channels a head, its text, and a recipe to recover with."""
    root = tmp_path_factory.mktemp("sweep")
    write_text(root)
    recipe = RECIPE.format(root=root, steps=MODEL_STEPS)
    write_run(root / "dense", GATED_DELTANET, weights(GATED_DELTANET), recipe=recipe)
    (root / "recover.toml").write_text(RECIPE.format(root=root, steps=RECOVERY_STEPS))
    return root


def run_alone(words: list[str]) -> None:
    """A sweep in a process of the tests' pool, as torchrun would start it."""
    import torch.distributed as dist

    dist.destroy_process_group()
    options = sweep.STAGE.parse(words)
    sweep.check(options, int(os.environ["WORLD_SIZE"]))
    sweep.run(options)


def refused_alone(words: list[str]) -> str:
    """What the sweep says that `run_alone` cannot run."""
    with pytest.raises(UserError) as error:
        run_alone(words)
    return str(error.value)


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def rows(out: Path) -> list[dict[str, Any]]:
    return results(out)["rows"]


# The words.


def test_every_word_becomes_a_command_line_of_prune() -> None:
    words = ("drrqr:f=1.2:multiple-of=8", "l1@head=0.389", "l1@key=0.5+head=0.25", "random:seed=4")
    found = points(words, ("0.25", ".5"), "key", (0,))
    assert {p.name: p.words[2:] for p in found if p.method != "drrqr:f=1.2:multiple-of=8"} == {
        "l1@head=0.389": ("--space", "head", "--ratio", "0.389"),
        "l1@key=0.5+head=0.25": ("--space", "key,head", "--ratio", "key=0.5,head=0.25"),
        "random:seed=4@key=0.25": ("--seed", "4", "--space", "key", "--ratio", "0.25"),
        "random:seed=4@key=.5": ("--seed", "4", "--space", "key", "--ratio", ".5"),
    }
    assert found[0].words[:6] == ("--method", "drrqr", "--f", "1.2", "--multiple-of", "8")
    assert [p.own_ratio for p in found] == [False, False, True, True, False, False]


def test_methods_that_draw_are_points_for_each_seed() -> None:
    found = points(("random", "l1"), ("0.5",), "key+value", (0, 3))
    assert [(p.name, p.seed) for p in found] == [
        ("random:seed=0@key+value=0.5", 0),
        ("random:seed=3@key+value=0.5", 3),
        ("l1@key+value=0.5", None),
    ]
    assert found[0].words[-3:] == ("key,value", "--ratio", "0.5")
    assert found[0].method == found[1].method == "random"


def test_repaired_points_read_the_sweep_s_data_and_keep_their_seeds(root: Path) -> None:
    words = "random:repair=output,l1:repair=output,drrqr:repair=output,drrqr"
    arguments = ["--methods", words, "--ratios", "0.5", "--seeds", "5,6", "--sequences", "3"]
    options = sweep.STAGE.parse([str(root / "dense"), "out", *arguments])
    text, dense = in_memory(heldout_text(resolve(options.model), options.text)), Dense("", "auto")
    work = Work(options.folder, options.model, text, dense, Path("stats"), data=options.data)
    found = {point.name: work.pruning(point, "out") for point in options.points}
    assert options.repairs and [made.repairs for made in found.values()] == [True] * 4 + [False]
    seeds = [made.data.seed for made in found.values()]
    assert seeds == [5, 6, 42, 42, 42]
    assert [made.method.seed for made in list(found.values())[:2]] == [5, 6]
    assert [made.data.sequences for made in found.values()] == [3, 3, 3, 3, 16]
    given = [made.stats for made in found.values()]
    assert given == [None, None, None, Path("stats"), Path("stats")]


def test_points_with_refitted_gates_read_the_sweep_s_statistics(root: Path, tmp_path: Path) -> None:
    config = KDA_HYBRIDS["kimi_linear"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    arguments = ["--methods", "l1@square=0.5,l1@head=0.3,random@head=0.3", "--repair", "none"]
    options = sweep.STAGE.parse([str(tmp_path), "out", *arguments])
    assert needing(options, config) == {"l1": (GateMoments,)}
    text, dense = in_memory(heldout_text(resolve(str(root / "dense")), options.text)), Dense("", "")
    work = Work(options.folder, options.model, text, dense, Path("stats"), data=options.data)
    found = [work.pruning(point, "out").stats for point in options.points]
    assert found == [Path("stats"), None, None]


def test_every_registered_method_is_a_word() -> None:
    found = points(tuple(METHODS), ("0.5",), "key", (0,))
    assert [point.words[1] for point in found] == list(METHODS)


def test_options_of_the_stages_go_on_to_them(root: Path) -> None:
    line = f"M O {shlex.join(SMALL)} --paper --recover R --lora.rank 4 --a.b=c --optimizer.lr -1"
    options = sweep.STAGE.parse(
        [*shlex.split(line), "--data", "D", "--seed", "3", "--seeds", "1,2"]
    )
    assert options.budget_words == ("--multiple-of", "8", "--paper")
    assert words(options.data) == ["--data", "D", "--sequences", "3", "--seed", "3"]
    assert options.recovery is not None
    assert options.recovery.overrides == ("--lora.rank", "4", "--a.b=c", "--optimizer.lr", "-1")
    assert len(options.points) == 2 + 2 + 4


# What is refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods magic --ratios 0.5", "unknown method 'magic': choose from drrqr"),
        ("--methods l1", "l1@key has no ratio: give --ratios"),
        ("--methods l1 --ratio 0.5", "--ratio: did you mean --ratios?"),
        ("--methods l1, --ratios 0.5", "--methods: 'l1,' has an empty part"),
        ("--methods l1,l1 --ratios 0.5", "--methods: l1,l1 names l1 twice"),
        ("--methods l1,l1@key --ratios 0.5", "l1@key=0.5 is in the sweep twice"),
        ("--methods l1@ --ratios 0.5", "cannot read 'l1@' in --methods: write METHOD"),
        ("--methods l1@key+head=0.5", "give a ratio to every kind, or to none"),
        ("--methods l1:ratio=0.3 --ratios 0.5", "l1:ratio=0.3: ratio is set by @KIND=RATIO or"),
        ("--methods drrqr:sequences=9 --ratios 0.5", "sequences is set by an option of the sweep"),
        ("--methods random --ratios 0.5 --seeds 1,x", "--seeds: x is not a whole number"),
        ("--methods l1 --ratios 0.5 --training.steps 3", "--training.steps is for a recovery"),
        ("--methods l1 --ratios 0.5 --recover R --model.init M", "--model.init is the sweep's to"),
        ("--methods l1 --ratios 0.5 --dense-continued", "--dense-continued is for a recovery"),
        ("--methods l1 --ratios 0.5,1.5", "l1@key=1.5: ratio 1.5 is not between 0 and 1"),
        ("--methods l1 --ratios 0.5,half", "l1@key=half: ratio 'half' is not a number"),
        ("--methods l1:f=2 --ratios 0.5", "l1:f=2@key=0.5: --f is no option of l1"),
        (
            "--methods l1 --ratios 0.25,0.5 --multiple-of 16",
            "l1@key=0.25 and l1@key=0.5 keep as many channels",
        ),
        # Squares of 8, though value channels alone would be 10 and 8.
        ("--methods l1@square --ratios 0.55,0.6", "keep as many channels"),
        ("--methods l1@nose --ratios 0.5", "l1@nose=0.5: unknown kind of space 'nose'"),
        (
            "--methods drrqr@head --ratios 0.5",
            "drrqr@head=0.5: drrqr does not choose",
        ),
        (
            "--methods l1 --ratios 0.5 --allocate auto",
            "sweep uniform, layer and model, or use slimstate prune",
        ),
        ("--methods l1 --ratios 0.5 --recover nowhere.toml", "nowhere.toml"),
        ("--methods l1 --ratios 0.5 --heldout nowhere.txt", "nowhere.txt"),
    ],
)
def test_one_line_says_what_is_wrong(root: Path, tmp_path: Path, words: str, message: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=re.escape(message)) as error:
        sweep.check(sweep.STAGE.parse([str(root / "dense"), str(out), *shlex.split(words)]), 1)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_ratios_of_heads_of_all_layers_may_agree_in_each_layer(root: Path) -> None:
    """Of two heads a layer one stays at both ratios, of the four of two layers three and two."""
    words = ["--methods", "random@head", "--ratios", "0.2,0.4", "--allocate", "model"]
    options = sweep.STAGE.parse([str(root / "dense"), "out", *words])
    reference = resolve(root / "dense")
    check_points(options, reference)
    uniform = sweep.STAGE.parse([str(root / "dense"), "out", *words[:4]])
    with pytest.raises(UserError, match="keep as many channels and are the same model"):
        check_points(uniform, reference)


def test_places_that_are_taken_are_refused(root: Path, tmp_path: Path) -> None:
    def refused(out: Path, *words: str) -> str:
        with pytest.raises(UserError) as error:
            options = sweep.STAGE.parse([str(root / "dense"), str(out), "--methods", "l1", *words])
            sweep.check(options, 1)
        return str(error.value)

    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    half = ("--ratios", "0.5")
    assert "lies inside the model's folder" in refused(root / "dense" / "sweep", *half)
    assert "holds the model" in refused(root, *half)
    assert "is a file" in refused(tmp_path / "file", *half)
    assert "is not empty and no sweep" in refused(tmp_path / "full", *half)
    assert "is not empty and no sweep" in refused(tmp_path / "full", *half, "--overwrite")


def test_room_is_asked_for_before_work(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed(*words: str) -> float:
        with pytest.raises(UserError, match=r"GB, .* free") as error:
            line = [str(root / "dense"), str(tmp_path / "out"), "--methods", "l1,l2", *words]
            sweep.check(sweep.STAGE.parse([*line, "--ratios", "0.5", "--max-sequences", "1"]), 2)
        return float(re.findall(r"needs (\S+) GB", str(error.value))[0])

    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("launch.sweeping.checks.total_bytes", lambda source: 10**9)
    # Two processes hold a model each; kept are the two pruned models and the dense one's place.
    assert needed() == 2 and needed("--keep") == 3


def _killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_other_options_in_a_folder_are_refused_and_more_points_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = SweepFolder(tmp_path / "out"), tmp_path / "model"
    settings = {"model": "abc", "calibration": ["--sequences", "3"], "recovery": None}
    folder.begin(settings, overwrite=False)
    folder.check(settings, False, model)
    other = {**settings, "calibration": ["--sequences", "4"]}
    with pytest.raises(UserError, match=r'begun with calibration \["--sequences", "3"\], not'):
        folder.check(other, False, model)
    folder.check(other, True, model)
    folder.keep("a", {"name": "a"})
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Path, "unlink", _killed)
        (folder.path / "results.json").touch()
        folder.begin(other, overwrite=True)
    folder.check(other, True, model)
    folder.begin(other, overwrite=True)
    assert folder.record("a") is None and not (folder.path / "results.json").exists()
    folder.check(other, False, model)


def test_a_point_belongs_to_one_process_and_a_failed_one_is_tried_once(tmp_path: Path) -> None:
    mine, theirs = SweepFolder(tmp_path), SweepFolder(tmp_path)
    mine.begin({}, overwrite=False)
    names = dict.fromkeys("abcd", ("before",))
    mine.keep("a", {"before": {}})
    taken = []
    for name in mine.open_points(names):
        taken.append(name)
        rest = list(theirs.open_points(names)) if name == "b" else []
        for other in rest:
            assert other in ("c", "d")
            theirs.fail(other, "two\nlines")
        mine.keep(name, {"before": {}})
    assert taken == ["b"]
    assert mine.failure("c") == "two lines"
    mine.begin({}, overwrite=False)
    assert list(mine.open_points(names)) == ["c", "d"]


# What is measured.


def test_sweep_on_two_processes_is_the_one_on_one(root: Path, tmp_path: Path) -> None:
    words = [str(root / "dense"), *SMALL, "--seeds", "0,1"]
    run_distributed(run_alone, 2, [words[0], str(tmp_path / "two"), *words[1:]])
    run_distributed(run_alone, 1, [words[0], str(tmp_path / "one"), *words[1:]])
    two, one = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert two == one and len(two) == PLANS
    for row in two:
        assert row["width"] == {"0.25": "24", "0.5": "16"}[row["ratio"]]
        assert row["removed"] == pytest.approx(float(row["ratio"]))
        assert row["seeds"] == (2 if row["method"] == "random" else None)
        assert math.isfinite(row["before"]) and "recovered" not in row
    drawn = [row for row in two if row["method"] == "random"]
    assert all(len(set(row["before_all"])) == 2 and row["before_spread"] > 0 for row in drawn)
    assert not list((tmp_path / "two" / "models").iterdir())
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("points/*")}
    run_distributed(run_alone, 2, [words[0], str(tmp_path / "two"), *words[1:]])
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert rows(tmp_path / "two") == one
    again = _measured_alone(root, tmp_path / "two" / "plans" / "drrqr@key=0.5", tmp_path / "half")
    assert again == next(r["before"] for r in two if (r["method"], r["ratio"]) == ("drrqr", "0.5"))


def _measured_alone(root: Path, plan: Path, out: Path) -> float:
    """Perplexity by `apply` and `eval`, as a person would measure a point of the sweep."""
    import flame.register  # noqa: F401
    from launch import evaluate
    from pruning import apply

    apply.STAGE.main([str(root / "dense"), str(plan / "plan.json"), str(out)])
    file = out.with_suffix(".json")
    rows = ["--max-sequences", "3", "--spread", "--json", str(file)]
    evaluate.STAGE.main([str(out), "--perplexity", *rows])
    return json.loads(file.read_text())["perplexity"]


def test_given_statistics_stand_in_for_a_calibration(root: Path, tmp_path: Path) -> None:
    from pruning import calibrate

    stats, out = tmp_path / "stats", tmp_path / "out"
    line = [str(root / "dense"), str(stats), "--methods", "drrqr", "--sequences", "2"]
    calibrate.STAGE.main(line)
    given = ["--ratios", "0.5", "--max-sequences", "3", "--stats", str(stats)]
    words = [str(root / "dense"), str(out), "--methods", "drrqr,l1", *given]
    run_distributed(run_alone, 1, words)
    plan = json.loads((out / "plans" / "drrqr@key=0.5" / "plan.json").read_text())
    assert plan["calibration"]["sequences"] == 2 and not (out / "statistics").exists()

    def refused(*words: str) -> str:
        with pytest.raises(UserError) as error:
            sweep.check(sweep.STAGE.parse([str(root / "dense"), str(tmp_path / "new"), *words]))
        return str(error.value)

    assert "--sequences" in refused("--methods", "drrqr", *given, "--sequences", "3")
    assert "no method of the sweep reads statistics" in refused("--methods", "l1", *given)
    assert "taylor" in refused("--methods", "taylor", *given)
    other = write_run(tmp_path / "other", GATED_DELTANET, weights(GATED_DELTANET, seed=5))
    words[:2] = [str(other), str(tmp_path / "new")]
    shutil.copy(root / "dense" / "recipe.toml", other)
    with pytest.raises(UserError, match="of another model"):
        sweep.check(sweep.STAGE.parse(words))


def test_rises_over_the_dense_model_have_intervals() -> None:
    points_ = points(["l1", "random"], ["0.5"], "key", [0, 1])
    one, *random = (point.file_name for point in points_)
    hard = [float(n % 7) for n in range(30)]

    def measured(gap: float) -> dict[str, Any]:
        losses = [10 * (3 + one + gap * (1 + n % 2)) for n, one in enumerate(hard)]
        found = {"perplexity": 20.0 + gap, "state_bytes": 50, "parameters": 9}
        return {**found, "documents": {"losses": losses, "tokens": [10] * 30}}

    def record(gap: float) -> dict[str, Any]:
        return {"before": measured(gap), "widths": {"key": [16, 16]}, "notes": []}

    records = {one: record(0.1), random[0]: record(0.3), random[1]: record(0.5)}
    controls = {"before": measured(0.0) | {"state_bytes": 100}, "recovered": {}}
    l1, drawn = collect_rows(points_, records, controls)
    assert l1["before_difference"]["loss"] == pytest.approx(0.15)
    assert l1["before_difference"]["low"] < 0.15 < l1["before_difference"]["high"]
    assert l1["before_rise"].startswith("+0.1500 [+0.1")
    assert drawn["before_difference"]["loss"] == pytest.approx(0.6) and drawn["seeds"] == 2
    assert (
        "recovered_rise" not in l1 and "documents" not in without_documents(records[one])["before"]
    )
    (line, _) = rows_table([l1, drawn]).lines()[1:]
    assert l1["before_rise"] in line


def test_what_a_point_does_is_told_until_it_is_settled(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = SweepFolder(tmp_path)
    folder.begin({}, overwrite=False)
    folder.log("old").write_text("of an earlier run\n")
    with telling(folder, dict.fromkeys(("a", "b", "old"), ()), every=0.02):
        folder.log("a").write_text("step: 1\nstep: 2  \x1b[31mloss: 4.0\n\n")
        folder.keep("b", {"name": "b"})
        folder.log("b").write_text("done\n")
        told = ""
        while "step: 2" not in told:
            told += capfd.readouterr().err
    assert told + capfd.readouterr().err == "a: step: 2  [31mloss: 4.0\n"


def test_model_that_cannot_be_calibrated_leaves_nothing(root: Path, tmp_path: Path) -> None:
    tensors = weights(GATED_DELTANET)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
    recipe = RECIPE.format(root=root, steps=MODEL_STEPS)
    write_run(tmp_path / "dense", GATED_DELTANET, tensors, recipe=recipe)
    words = [str(tmp_path / "dense"), str(tmp_path / "out"), *SMALL]
    (reason,) = run_distributed(refused_alone, 1, words)
    assert reason.startswith("model.layers.1.mlp.up_proj.weight holds 1 NaN")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_table_page_and_files_hold_every_number(tmp_path: Path) -> None:
    found = synthetic()
    write_files(tmp_path, found, tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text()) == found
    grid, own = sweep_of(found).tables()
    assert [line["method"] for line in grid.rows] == ["dense", "drrqr", "random"]
    assert grid.rows[2]["0.5 before"] == "150.00 ± 12.50"
    assert own.rows[0]["method"] == "jrnp"
    for name in ("results.md", "results.tex", "sweep.html"):
        text = (tmp_path / name).read_text()
        for number in ("101.00", "121.50", "150.00", "131.25", "99.50"):
            assert number in text, f"{name}: {number}"
    assert (tmp_path / "results.csv").read_text().count("\n") == 1 + len(found["rows"])


def test_page_is_whole_and_refers_to_nothing() -> None:
    found = synthetic()
    text = page(sweep_of(found), found)
    parser = Nesting()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and parser.links == []
    assert "nan" not in text and (text.count("<svg"), text.count('class="bars')) == (2, 2)
    assert "With 50 % of the key channels removed, drrqr has perplexity 105.00" in text
    assert "105.00 after recovery, against 99.50 of the dense model and 140.00 at random" in text
    assert "fill: var(--random); fill-opacity: 0.16" in text and "pca is exact here" in text


def test_report_takes_a_sweep_that_lies_beside_its_model(root: Path, tmp_path: Path) -> None:
    from launch import report
    from launch.reporting.collect import collect
    from launch.reporting.page import page as report_page

    shutil.copytree(root / "dense", tmp_path / "dense")
    (tmp_path / "sweep").mkdir()
    found = {**synthetic(), "model": "dense", "weights": str(tmp_path / "dense")}
    write_files(tmp_path / "sweep", found)
    data = collect([tmp_path])
    assert "131.25" in report_page(data) and "<svg" in report_page(data)
    assert "| random | 131.25 ± 12.50 |" in report.markdown(data)
    shutil.rmtree(tmp_path / "dense")
    shutil.copytree(root / "dense", tmp_path / "elsewhere" / "other")
    with pytest.raises(UserError, match="nothing to report"):
        collect([tmp_path / "elsewhere"])


def test_ticks_of_a_logarithmic_axis_are_round_and_some() -> None:
    for low, high in [(98.0, 113.0), (90.0, 700.0), (3.0, 4000.0), (1.001, 1.003)]:
        ticks = log_ticks(low, high)
        assert 3 <= len(ticks) <= 12 and all(low <= tick <= high for tick in ticks)


def synthetic() -> dict[str, Any]:
    """Results of two methods at two ratios, and of one with a ratio of its own."""

    def row(method: str, ratio: str, before: float, recovered: float, **more: Any) -> dict:
        common = {"space": "key", "own_ratio": False, "width": "16", "state_bytes": 1000}
        part = {"removed": float(ratio), "parameters": 9, "seeds": None, "notes": []}
        values = {"method": method, "ratio": ratio, "before": before, "recovered": recovered}
        return {**common, **part, **values, **more}

    spread = {"before_spread": 12.5, "recovered_spread": 5.0, "seeds": 3}
    return {
        "kind": "sweep",
        "title": "a sweep",
        "ratios": ["0.25", "0.5"],
        "controls": {"before": 101.0, "recovered": 99.5},
        "rows": [
            row("drrqr", "0.25", 110.0, 103.0, notes=["pca is exact here"]),
            row("drrqr", "0.5", 121.5, 105.0),
            row("random", "0.25", 131.25, 120.0, **spread),
            row("random", "0.5", 150.0, 140.0, **spread),
            row("jrnp", "0.389", 160.0, 141.0, own_ratio=True, space="head"),
        ],
        "command": "slimstate sweep M O",
        "format": 1,
        "versions": {},
    }


# The whole, from the command line.


def slimstate(*words: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", *words]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_sweep_goes_on_to_the_same_table(root: Path, tmp_path: Path) -> None:
    """Three methods at two ratios with recovery on two processes; killed early on."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    words = [*SMALL, "--recover", str(root / "recover.toml"), "--dense-continued"]
    command = slimstate("sweep", str(root / "dense"), str(out), *words, "--nproc", "2")
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while len(_whole(out)) < 3:
        assert job.poll() is None, job.stdout and job.stdout.read()
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    done = {path.name: path.stat().st_mtime_ns for path in _whole(out)}
    assert 3 <= len(done) < PLANS + 2
    _runs(command)
    assert {n: (out / "points" / n).stat().st_mtime_ns for n in done} == done
    _runs(slimstate("sweep", str(root / "dense"), str(whole), *words))
    assert rows(out) == rows(whole) and results(out)["controls"] == results(whole)["controls"]
    assert all(row["recovered"] < row["before"] for row in rows(out))
    assert not list((out / "models").iterdir())


def _whole(out: Path) -> list[Path]:
    """Records of points that were measured in all stages."""
    paths = [path for path in (out / "points").glob("*.json") if path.stem != "dense"]
    found = [path for path in paths if "recovered" in json.loads(path.read_text())]
    return found + list((out / "points").glob("dense.json"))


@pytest.mark.slow
def test_failed_point_is_named_and_the_others_go_on(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [str(root / "dense"), str(out), *SMALL, "--keep"]
    _runs(slimstate("sweep", *words))
    # The point is measured anew, and the folder of its plan cannot be made: a file is in its place.
    (out / "points" / "l1@key=0.5.json").unlink()
    shutil.rmtree(out / "plans" / "l1@key=0.5")
    (out / "plans" / "l1@key=0.5").write_text("")
    failed = subprocess.run(slimstate("sweep", *words), capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1 and "1 of 7 points failed (l1@key=0.5)" in failed.stderr
    assert "l1@key=0.5 failed:" in failed.stdout and len(rows(out)) == PLANS - 1
    (out / "plans" / "l1@key=0.5").unlink()
    _runs(slimstate("sweep", *words))
    assert len(rows(out)) == PLANS and (out / "models" / "drrqr@key=0.5" / "pruned").is_dir()


def _runs(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
