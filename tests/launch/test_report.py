"""`slimstate report`: every number of the runs and of the files beside them, in every format."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape

from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.storage.json_file import read_object_if_any
from launch import capacity, report, serve_check
from launch.ranks.analysis_files import write_analysis
from launch.report import STAGE, check
from launch.reporting.collect import collect
from launch.reporting.envelope import enveloped
from launch.reporting.lineage import control_of, lineages
from launch.reporting.page import page
from launch.reporting.run_folders import find_runs
from launch.speed.bench_table import cell
from pruning import prune
from pruning.adapters import adapter_for
from pruning.states.analysis import METRICS, Analysis
from tests.launch.reporting.test_page import Nesting
from tests.pruning.models import GATED_DELTANET, weights, write_run, write_text

BEFORE, AFTER = 2 * 4 * 32 * 24 * 4, 2 * 4 * 16 * 24 * 4
"""State bytes of the model before and after pruning: layers, value heads, keys, values, fp32."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run that was trained, and the same pruned by the real command, with nothing else."""
    root = tmp_path_factory.mktemp("runs")
    text = write_text(root / "text")
    write_run(root / "dense", GATED_DELTANET, weights(GATED_DELTANET))
    _log_losses(root / "dense", {1: 5.5, 2: 4.25, 3: 4.125})
    prune.STAGE.main([
        str(root / "dense"), str(root / "half"), "--method", "drrqr", "--ratio", "0.5",
        "--data", str(text), "--tokenizer", str(root / "text" / "tokenizer"),
        "--sequences", "2", "--seq-len", "64",
    ])  # fmt: skip
    return root


@pytest.fixture
def results(runs: Path, tmp_path: Path) -> Path:
    """The runs with every kind of result file beside them."""
    import shutil

    root = tmp_path / "all"
    shutil.copytree(runs, root)
    recalled = {"a": recall(root, "dense", 0.987), "b": recall(root, "half", 0.4321)}
    foreign = {"model": "/elsewhere/other", "perplexity": 77.77}
    _write(root / "eval.json", result("eval", evaluations(root)))
    _write(root / "recall.json", result("recall", {"models": recalled}))
    _write(root / "speed.json", result("bench", benchmark(root)))
    _write(root / "foreign.json", result("eval", foreign))
    _write(root / "bare.json", {**foreign, "model": str(root / "half")})
    (root / "broken.json").write_text("{")
    (root / "deep.json").write_text('{"kind": ' + "[" * 900 + "]" * 900 + "}")
    (root / "deeper.json").write_text('{"kind": ' + "[" * 100_000)
    _write_analysis(root / "analysis", root)
    return root


def test_page_holds_every_number_and_nothing_foreign(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    run(results, "--out", out)
    text = out.read_text()
    for part in numbers():
        assert part in text, part
    for part in (
        "dense",
        "half",
        "pruned by drrqr from dense",
        "Layer 0: 16 of 32 channels",
        "Layer 1: 16 of 32 channels",
    ):
        assert part in text, part
    assert "--method drrqr --ratio 0.5 --space key" in text and "2.99.0" in text
    assert "77.77" not in text and "nan" not in text.lower()
    parser = Nesting()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and parser.links == []
    assert not parser.tags & {"script", "link", "iframe", "img", "object"}
    assert not re.search(r"https?://|url\((?!#)|@import|xmlns", text)
    assert text.count("<style>") == 1


def test_markdown_and_latex_hold_the_same_numbers(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.md"
    run(results, "--out", out)
    capsys.readouterr()
    run(results, "--latex")
    latex = capsys.readouterr().out
    for part in numbers():
        assert part in out.read_text(), part
        assert part.replace("%", r"\%").replace("±", r"$\pm$").replace("–", "--") in latex, part
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 10
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 10
    assert not (results / "report.html").exists()
    run(results, "--markdown")
    assert capsys.readouterr().out == out.read_text()


def test_runs_alone_have_sizes_plan_and_losses(runs: Path) -> None:
    data = collect([runs / "dense", runs / "half"])
    assert list(data.rows) == ["dense", "half"]
    assert data.lineages["dense"].kind == "dense" and not data.lineages["dense"].parent
    half = data.lineages["half"]
    assert (half.kind, half.parent, half.tokens) == ("pruned", "dense", 0)
    assert half.text == "pruned by drrqr from dense" and data.states == {"half": (BEFORE, AFTER)}
    assert [row["state_bytes"] for row in data.rows.values()] == [BEFORE, AFTER]
    parameters = sum(tensor.numel() for tensor in weights(GATED_DELTANET).values())
    assert data.rows["dense"]["parameters"] == parameters
    assert data.loss_curves == {"dense": ([1, 2, 3], [5.5, 4.25, 4.125])}
    assert data.plans["half"]["method"] == "drrqr" and data.method == "drrqr"
    assert data.plans["half"]["calibration tokens"] == 128
    assert "no serving engine has a class" in data.plans["half"]["served by"]
    assert [len(layer.kept[0]) for layer in data.kept] == [16, 16]
    assert data.commands[0].startswith("slimstate train --config")
    assert data.commands[1].startswith(f"slimstate prune {runs}/dense {runs}/half --method drrqr")
    assert not (data.tasks or data.fidelity or data.recall or data.ranks or data.bench)


def test_two_models_in_one_plot_have_the_colours_of_their_rows(results: Path) -> None:
    (analysis,) = collect([results]).ranks
    two = [plot.picture for plot in analysis.plots if ", mean over" in plot.title]
    drawn = [picture for picture in two if ">half<" in picture and ">other<" in picture]
    assert len(drawn) == 2
    for picture in drawn:
        assert "var(--pruned)" in picture and "var(--other)" in picture
        assert "var(--dense)" not in picture
    assert [row["model"] for row in analysis.layers] == ["half", "half"]


def test_a_table_of_perplexities_is_of_one_text(results: Path) -> None:
    held, long = collect([results]).texts
    assert {name: record["perplexity"] for name, record in held.records.items()} == {
        "dense": 12.345, "half": 13.579,
    }  # fmt: skip
    assert held.heading == "Held-out perplexity on held.txt, rows of 64 tokens"
    assert list(long.records) == ["half"] and long.records["half"]["perplexity"] == 99.875
    # Another step of a run is not the run.
    record = evaluations(results)["models"]["runs/dense"]
    other = record | {"weights": str(results / "dense" / "checkpoint" / "step-3")}
    _write(results / "step.json", result("eval", other))
    assert set(collect([results]).texts[0].records) == {"dense", "dense/step-3", "half"}


def test_speeds_of_different_batches_have_columns_of_their_own(results: Path) -> None:
    small = benchmark(results)
    small["measures"][0] |= {"batch_size": 1, "values": {"half": {"median": 77.5}}}
    del small["models"]["dense"]
    _write(results / "small.json", result("bench", small))
    data = collect([results])
    rows = {name: {h: row[h] for h in data.speeds} for name, row in data.rows.items()}
    eight, one = "decoded tokens/s, batch 8", "decoded tokens/s, batch 1"
    assert rows == {"dense": {eight: 2000.0, one: None}, "half": {eight: 1234.5, one: 77.5}}


def trained(dense: Path, start: Path, folder: Path, steps: int, **base: str) -> Path:
    """A run of so many steps that began from `start`, with adapters if `base` is given."""
    import shutil

    shutil.copytree(dense if "dense" in start.name else start, folder)
    (folder / "plan.json").unlink(missing_ok=True)
    (folder / "checkpoint" / "step-7").rename(folder / "checkpoint" / f"step-{steps}")
    if not (folder / "tb").exists():
        _log_losses(folder, {1: 4.5, 2: 4.25})
    training = "[training]\nglobal_batch_size = 4\nseq_len = 64\n"
    (folder / "recipe.toml").write_text(f'[model]\ninit = "{start}/checkpoint/step-7"\n{training}')
    if base:
        _write(folder / "base.json", base)
    return folder


def test_what_was_made_from_what_is_told_by_fingerprints(runs: Path, tmp_path: Path) -> None:
    dense, half = runs / "dense", runs / "half"
    trained(dense, half, tmp_path / "r", 5)
    trained(dense, dense, tmp_path / "c", 5)
    trained(dense, dense, tmp_path / "short", 3)
    mark = fingerprint_of(half)
    trained(dense, half, tmp_path / "lora", 5, reference="../gone", fingerprint=mark)
    with (tmp_path / "lora" / "recipe.toml").open("a") as recipe:
        recipe.write('[lora]\nrank = 4\n[distill]\nteacher = "../gone"\n')
    found = lineages(find_runs([dense, half, tmp_path]))
    kinds = {name: (its.kind, its.parent, its.tokens) for name, its in found.items()}
    assert kinds == {
        "dense": ("dense", None, None),
        "half": ("pruned", "dense", 0),
        "r": ("recovered", "half", 5 * 256),
        "lora": ("recovered", "half", 5 * 256),
        "c": ("dense_continued", "dense", 5 * 256),
        "short": ("dense_continued", "dense", 3 * 256),
    }
    assert found["r"].text == "trained on from half for 5 steps (1,280 tokens)"
    assert found["lora"].text == f"{found['r'].text}, LoRA of rank 4, with a teacher"
    assert [control_of(name, found) for name in ("half", "r", "lora", "c")] == [
        "dense", "c", "c", None,
    ]  # fmt: skip


def test_names_of_folders_make_no_relation(runs: Path, tmp_path: Path) -> None:
    """A foreign model called dense, and a pruned run that was trained on for five steps."""
    import shutil

    other = {name: 2 * tensor for name, tensor in weights(GATED_DELTANET).items()}
    write_run(tmp_path / "dense", GATED_DELTANET, other)
    shutil.copytree(runs / "half", tmp_path / "pruned")
    found = lineages(find_runs([tmp_path]))
    assert found["dense"].kind == "" and found["pruned"].parent is None
    assert found["pruned"].text == "pruned by drrqr from a model that is not here"
    assert control_of("pruned", found) is None

    checkpoint = tmp_path / "pruned" / "checkpoint"
    (checkpoint / "step-7").rename(checkpoint / "step-12")
    _log_losses(tmp_path / "pruned", {8: 4.5, 12: 4.25})
    (tmp_path / "pruned" / "recipe.toml").write_text(
        "[training]\nglobal_batch_size = 4\nseq_len = 64\n"
    )
    found = lineages(find_runs([runs / "dense", tmp_path / "pruned"]))
    assert (found["pruned"].parent, found["pruned"].steps) == ("dense", 5)
    assert found["pruned"].text == (
        "pruned by drrqr from dense, trained on for 5 steps (1,280 tokens)"
    )
    # Nothing is claimed of it while no dense model was trained on for as long.
    assert control_of("pruned", found) is None


def test_results_are_read_from_anywhere(runs: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    figures = evaluations(runs)
    (runs / "long.json").unlink()
    moved = figures["models"]["runs/dense"]
    # The path of a machine that is not this one: told by the fingerprint.
    moved |= {"weights": "/gone/dense", "fingerprint": fingerprint_of(runs / "dense")}
    _write(elsewhere / "figures.json", result("eval", figures))
    _write(elsewhere / "stranger.json", result("eval", moved | {"fingerprint": "other"}))
    assert not collect([runs / "dense", runs / "half"]).texts
    for named in (elsewhere, elsewhere / "figures.json"):
        (held,) = collect([runs / "dense", runs / "half"], named=[named]).texts
        assert [r["perplexity"] for r in held.records.values()] == [12.345, 13.579]
    options = [str(runs), "--results", str(elsewhere / "none.json")]
    with pytest.raises(UserError, match="none.json: no such file or folder"):
        check(STAGE.parse(options))
    (elsewhere / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="plan.json holds no result of a slimstate command"):
        collect([runs / "half"], named=[elsewhere / "plan.json"])


def test_capacity_and_engines_have_sections(runs: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "config.json"
    stranger.write_text((runs / "dense" / "config.json").read_text())
    for name, words in {
        "mine": [str(runs / "half"), "--against", str(runs / "dense")],
        "foreign": [str(stranger)],
    }.items():
        capacity.STAGE.main([*words, "--json", str(tmp_path / f"{name}.json")])
    serve_check.STAGE.main([str(runs / "half"), "--json", str(tmp_path / "served.json")])
    data = collect([runs / "dense", runs / "half"], named=[tmp_path])
    assert list(data.serving) == ["Requests on one GPU: half and dense", "Engines that serve half"]
    notes, table = data.serving["Requests on one GPU: half and dense"]
    assert notes[0].startswith("80 GiB") and [c.heading or c.key for c in table.columns][1:3] == [
        "half",
        "dense",
    ]
    ratios = {row["label"]: row["ratio"] for row in table.rows}
    assert ratios["recurrent states a sequence"] == AFTER / BEFORE
    text = page(data)
    for heading, (sentences, _) in data.serving.items():
        assert heading in text
        assert [s for s in sentences if str(escape(s)) not in text] == []


def fingerprint_of(folder: Path) -> str:
    reference = resolve(folder)
    return fingerprint(reference.config, reference.source())


def test_mistakes_are_one_line(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([tmp_path / "none"], "no run at"),
        ([tmp_path / "empty"], "is no run and holds none: a run has config.json and checkpoint/"),
        ([tmp_path / "file"], "is a file: give a run folder, or a folder of runs"),
        ([runs, "--out", tmp_path / "file"], "the name must end in .html or .md"),
        ([runs / "dense", "--out", runs / "report.html"], "exists: choose another, or pass"),
    ):
        (runs / "report.html").write_text("mine")
        with pytest.raises(UserError) as error:
            check(STAGE.parse([str(word) for word in arguments]))
        assert message in str(error.value) and "\n" not in str(error.value)
        assert (runs / "report.html").read_text() == "mine"
        (runs / "report.html").unlink()
    with pytest.raises(UserError, match="--nproc 2: report only reads files"):
        check(STAGE.parse([str(runs)]), world_size=2)


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "alone", GATED_DELTANET, weights(GATED_DELTANET))
    with pytest.raises(UserError, match="nothing to report on .*alone: no plan, no losses and no"):
        collect([tmp_path / "x" / "alone"])


def test_the_newest_of_two_benchmarks_holds_and_a_damaged_one_is_named(results: Path) -> None:
    import os

    newer = benchmark(results)
    newer["measures"][0]["ratio"] = 0.5
    _write(results / "again.json", result("bench", newer))
    os.utime(results / "speed.json", (1, 1))
    (record,) = collect([results]).bench
    assert record["measures"][0]["ratio"] == 0.5 and list(record["models"]) == ["dense", "half"]
    del newer["measures"][0]["values"]
    _write(results / "again.json", result("bench", newer))
    with pytest.raises(UserError, match="again.json looks like a result, but KeyError 'values'"):
        collect([results])


def test_nothing_of_a_result_is_markup(results: Path, tmp_path: Path) -> None:
    hostile = "<script>x()</script> <svg onload=x()> $x_1^$ & </text> nan 0.12345 #fe0105"
    _write_analysis(results / "analysis", results, hostile)
    _write_hostile(results, hostile)
    (results / "analysis" / "mine.svg").write_text(f"<svg>{hostile} of mine</svg>")
    out = tmp_path / "page.html"
    run(results, "--out", out)
    text = out.read_text()
    parser = Nesting()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and parser.links == [] and "script" not in parser.tags
    assert "<svg onload" not in text and "of mine" not in text
    assert text.count("&lt;script&gt;x()") > 12 and "$x_1^$ &amp;" in text
    assert not parser.tags - TAGS, parser.tags - TAGS
    assert not {name for name in parser.names if name.startswith("on")}
    assert "nan 0.12345 #fe0105" in text and "1.25" in text


def test_an_analysis_that_cannot_be_drawn_is_named(results: Path) -> None:
    file = results / "analysis" / "summary.json"
    summary = json.loads(file.read_text())
    _write(file, {**summary, "metric": "pie"})
    with pytest.raises(UserError, match="summary.json looks like a result, but KeyError 'pie'"):
        collect([results])
    _write(file, {**summary, "format": 2})
    with pytest.raises(UserError, match="summary.json has format 2, this slimstate reads up to 1"):
        collect([results])
    _write(file, summary)
    (results / "analysis" / "analysis.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match="summary.json looks like a result, but Arrow"):
        collect([results])


TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3",
    "p", "ul", "li", "dl", "dt", "dd", "div", "span", "table", "tr", "th", "td", "pre", "code",
    "details", "summary",
    "svg", "g", "path", "rect", "text", "defs", "clippath", "use",
}  # fmt: skip
"""All that a page is made of: ours, and what matplotlib draws with."""


def _write_hostile(root: Path, hostile: str) -> None:
    """Every text of every result file, a plan and a folder's name replaced by `hostile`."""
    for file in root.glob("*.json"):
        content = read_object_if_any(file)
        if content.get("kind") in ("eval", "recall", "bench"):
            _write(file, _poisoned(content, hostile))
    plan = json.loads((root / "half" / "plan.json").read_text())
    plan["method"]["name"] = hostile
    plan["calibration"]["data"]["dataset"] = plan["versions"]["torch"] = hostile
    _write(root / "half" / "plan.json", plan | {"notes": [hostile]})
    (root / "half").rename(root / "half<b onclick=x()>")


def _poisoned(value: Any, hostile: str, key: str = "") -> Any:
    """`value` with each text replaced that names no key, model or kind of measure."""
    if isinstance(value, dict):
        return {name: _poisoned(item, hostile, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_poisoned(item, hostile, key) for item in value]
    kept = ("kind", "weights", "model", "reference", "name", "against")
    return hostile if isinstance(value, str) and key not in kept else value


def run(folder: Path, *words: Any) -> None:
    options = STAGE.parse([str(folder), *map(str, words)])
    check(options)
    report.run(options)


def numbers() -> list[str]:
    """What each result must be read as."""
    spread = cell({"median": 1234.5, "min": 1200, "max": 1300, "runs": [1, 2, 3]}, "tokens/s")
    return [
        "12.345", "13.579", "3.1416", f"{BEFORE:,}", f"{AFTER:,}",
        "0.5123 ± 0.0103", "28.12 ± 0.12", "0.1234", "0.8765", "99.875",
        "98.7%", "43.2%", "2.50", "4.000", "0.200", "7.3%", "1.87", "2.31", spread, "0.617",
    ]  # fmt: skip


def result(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """A result file's content."""
    return enveloped(kind, f"slimstate {kind}", {"versions": {"torch": "2.99.0"}, **content})


def evaluations(root: Path) -> dict[str, Any]:
    def record(name: str, perplexity: float, data: str = "held.txt", length: int = 64) -> Any:
        return {
            "model": f"runs/{name}", "weights": str(root / name / "checkpoint" / "step-7"),
            "perplexity": perplexity, "bits_per_byte": 3.1416, "data": data, "seq_len": length,
        }  # fmt: skip

    _write(root / "long.json", result("eval", record("half", 99.875, "long.txt", 99)))
    half = record("half", 13.579) | {
        "fidelity": {"kl": 0.1234, "agreement": 0.8765},
        "tasks": {
            "results": {
                "arc": {"alias": "arc", "acc,none": 0.5123, "acc_stderr,none": 0.0103},
                "wiki": {"word_perplexity,none": 28.12, "word_perplexity_stderr,none": 0.125},
            }
        },
    }
    return {"settings": {}, "models": {"runs/dense": record("dense", 12.345), "runs/half": half}}


def recall(root: Path, name: str, accuracy: float) -> dict[str, Any]:
    return {
        "model": str(root / name),
        "mqar": [{"pairs": 4, "accuracy": accuracy}, {"pairs": 8, "accuracy": 0.0731}],
        "needle": [],
        "query_noise": [
            {
                "layer": 0,
                "head": head,
                "stable_rank": 1.5 + head,
                "amplification": 4.0**head,
                "random_queries": 3.0,
                "error_at_10_percent": 0.1 * 2.0**head,
            }
            for head in range(3)
        ],
        "task": "mqar:pairs=4/8,length=64",
    }


def benchmark(root: Path) -> dict[str, Any]:
    def value(median: float) -> dict[str, Any]:
        return {"median": median, "min": 1200, "max": 1300, "runs": [1, 2, 3]}

    names = ("half", "dense")
    return {
        "models": {
            name: {"reference": str(root / name), "kernels": {"prefill": [], "decode": []}}
            for name in names
        },
        "against": "dense",
        "measures": [
            {
                "name": "decode", "label": "decoding, batch 8", "unit": "tokens/s",
                "batch_size": 8, "values": {"half": value(1234.5), "dense": value(2000.0)},
                "ratio": 0.61725,
            }
        ],
        "device": "cpu", "device_name": "a CPU", "dtype": "float32", "threads": 1, "repeats": 3,
        "peak_memory": "bytes",
    }  # fmt: skip


def _write_analysis(folder: Path, root: Path, other: str = "other") -> None:
    """An analysis of the pruned run beside a model that is gone: two layers of two heads."""
    folder.mkdir(exist_ok=True)
    layers = [{"layer": 0, "stable_rank": 1.87}, {"layer": 1, "stable_rank": 2.31}]
    summary = {
        "model_reference": str(root / "half"), "against_reference": "/gone/other",
        "data": ["held.txt"], "metric": "stable_rank",
        "length": 64, "sequences": 1, "model": {"layers": layers},
    }  # fmt: skip
    summary = result("analyze", summary)
    values = {name: torch.ones(1, 2, 2, 2, dtype=torch.float64) for name in METRICS}
    values["stable_rank"][0, 0, :, 1] = torch.tensor([1.25, 3.75])
    spectra = [torch.tensor([[[2.0, 1.0], [4.0, 0.5]]], dtype=torch.float64)] * 2
    analysis = Analysis([0, 1], [1, 64], values, spectra)
    write_analysis(
        folder, {("half", "held.txt"): analysis, (other, "held.txt"): analysis}, summary, {}
    )


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _log_losses(folder: Path, losses: dict[int, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tb" / "20250101-0000"))
    for step, loss in losses.items():
        writer.add_scalar("loss_metrics/global_avg_loss", loss, step)
    writer.close()


def test_state_bytes_are_the_adapters() -> None:
    assert adapter_for(GATED_DELTANET).state_bytes(GATED_DELTANET) == BEFORE
