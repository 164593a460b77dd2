"""Stage `analyze`: its table, summary and plots, the same for any number of processes."""

import dataclasses
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from flame.errors import UserError
from launch import analyze
from launch.analyze import STAGE, check
from launch.drawing.figure import svg_file
from launch.drawing.heatmaps import LEGEND_CELLS
from launch.ranks.analysis_files import (
    RANKS,
    SUMMARY_FILE,
    agreement,
    groups_summary,
    read_table,
    write_table,
)
from launch.ranks.precision import precision_sentence
from launch.ranks.rank_plots import NAMES, Series, plots
from launch.ranks.spectra import spectra_of
from pruning.state_rank import token_counts
from pruning.states.analysis import METRICS, Analysis
from tests.distributed import run_distributed
from tests.launch.drawing.test_pictures import cells
from tests.pruning.models import DELTA_NET, GATED_DELTANET, weights, write_hf, write_text

LENGTH, SEQUENCES = 96, 3
ARGUMENTS = ["--length", str(LENGTH), "--sequences", str(SEQUENCES)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts, a tokenizer, and models that have it: thin has half the keys."""
    folder = tmp_path_factory.mktemp("analyze")
    write_text(folder)
    lines = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    (folder / "other.jsonl").write_text("".join(lines[60:]))
    thin = {**GATED_DELTANET, "head_dim": 16, "expand_v": 1.5}
    for name, config in {"dense": GATED_DELTANET, "thin": thin, "delta": DELTA_NET}.items():
        write_hf(folder / name, config, weights(config))
        shutil.copytree(folder / "tokenizer", folder / name, dirs_exist_ok=True)
    write_hf(folder / "softmax", {"model_type": "llama", "vocab_size": 300}, {})
    return folder


def stage(*arguments: str) -> None:
    """Run `analyze` as one of the processes of its job."""
    from flame.process.distributed import world_size

    options = STAGE.parse(list(arguments))
    check(options, world_size())
    analyze.run(options)


@pytest.fixture(scope="module")
def outputs(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What one and two processes wrote of a pruned model, its dense form and a second text."""
    folders = [tmp_path_factory.mktemp("out") / f"analysis-{size}" for size in (1, 2)]
    for size, out in zip((1, 2), folders, strict=True):
        arguments = [str(home / "thin"), str(out), "--data", str(home / "text.jsonl"), *ARGUMENTS]
        extra = ["--against", str(home / "dense"), "--second-data", str(home / "other.jsonl")]
        run_distributed(stage, size, *arguments, *extra)
    return folders


def table(folder: Path) -> dict[str, np.ndarray]:
    from pyarrow import parquet

    columns = parquet.read_table(folder / "analysis.parquet").to_pydict()
    return {name: np.array(values, dtype=object) for name, values in columns.items()}


def test_one_and_two_processes_write_the_same_bytes(outputs: list[Path]) -> None:
    one, two = outputs
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        # The summary has the command line, and with it the name of the folder.
        assert (one / name).read_bytes().replace(bytes(one), bytes(two)) == (
            two / name
        ).read_bytes(), name


def test_the_table_has_a_row_for_each_state(outputs: list[Path]) -> None:
    columns = table(outputs[0])
    moments = token_counts(LENGTH)
    assert set(METRICS) < set(columns)
    keys = list(zip(*(columns[n] for n in ("model", "data", "sequence", "layer", "head", "tokens"))))  # fmt: skip  # noqa: B905, E501
    expected = {
        (model, data, sequence, layer, head, tokens)
        for model, data in [
            ("thin", "text.jsonl"), ("dense", "text.jsonl"), ("thin", "other.jsonl"),
        ]
        for sequence in range(SEQUENCES)
        for layer in range(2)
        for head in range(4)
        for tokens in moments
    }  # fmt: skip
    assert len(keys) == len(expected) and set(keys) == expected


def test_the_figures_of_the_table_belong_together(outputs: list[Path]) -> None:
    columns = table(outputs[0])
    seen = 0
    for row, values in enumerate(columns["singular_values"]):
        if columns["tokens"][row] < LENGTH:
            assert values is None
            continue
        seen += 1
        # The shorter side of a state: 16 keys against 24 values, or 24 values against 32 keys.
        assert len(values) == (16 if columns["model"][row] == "thin" else 24)
        assert columns["nuclear_norm"][row] == pytest.approx(sum(values))
        stable = sum(s * s for s in values) / values[0] ** 2
        assert columns["stable_rank"][row] == pytest.approx(stable)
        assert columns["utilisation"][row] == pytest.approx(stable / len(values))
    assert seen == 3 * SEQUENCES * 2 * 4
    first = columns["tokens"] == 1
    assert (columns["threshold_rank"][first] == 1).all(), "one token writes a state of rank one"


def test_the_summary_is_that_of_the_table(outputs: list[Path]) -> None:
    columns, summary = table(outputs[0]), json.loads((outputs[0] / SUMMARY_FILE).read_text())
    assert (summary["length"], summary["sequences"]) == (LENGTH, SEQUENCES)
    assert summary["data"][1].endswith("other.jsonl")
    assert summary["precision"] == "The states are float64, made from float32 activations."
    for key, model, data in [("model", "thin", "text"), ("against", "dense", "text"), ("second_data", "thin", "other")]:  # fmt: skip  # noqa: E501
        for layer in summary[key]["layers"]:
            chosen = (
                (columns["model"] == model)
                & (columns["data"] == f"{data}.jsonl")
                & (columns["layer"] == layer["layer"])
                & (columns["tokens"] == LENGTH)
            )
            for metric in set(METRICS) - {"sigma_ratio"}:
                assert layer[metric] == pytest.approx(columns[metric][chosen].mean()), metric
    for rank in RANKS:
        groups = summary["model"]["groups"][rank]
        assert groups["low_heads"] + groups["high_heads"] == 8
        assert len(groups["high"]) == groups["high_heads"]
        assert -1 <= summary["over_data"][rank]["spearman"] <= 1
        assert 0.9 < summary["over_data"][rank]["norm_cosine"] <= 1


def test_plots_are_files_that_a_viewer_can_read(outputs: list[Path]) -> None:
    names = {"heat_map", "heat_map_against", "rank_over_time", "spectra", "heads", "stability", "against", "against_over_time", "data"}  # fmt: skip  # noqa: E501
    assert {path.stem for path in outputs[0].glob("*.svg")} == names
    for path in outputs[0].glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "nan" not in path.read_text() and "inf" not in path.read_text()


def test_spectra_of_an_analysis_are_those_of_the_report() -> None:
    analysis = toy_analysis()
    for spectrum, layer, values in zip(
        spectra_of(analysis), analysis.layers, analysis.spectra, strict=True
    ):
        expected = (values / values[..., :1]).mean((0, 1))
        assert spectrum.layer == layer
        assert spectrum.values == pytest.approx(expected.tolist())
        squares = (values.square().sum(-1) / values[..., 0].square()).mean()
        assert spectrum.stable_rank == pytest.approx(float(squares))


def toy_analysis(heads: int = 6) -> Analysis:
    """Two layers; half of the heads have rank 8 at all times, the others 1 and a bit."""
    torch.manual_seed(0)
    moments = [1, 64, 128, 256]
    values = {name: torch.rand(2, 2, heads, 4).double() + 1 for name in METRICS}
    values["stable_rank"][:, :, heads // 2 :] += 8
    spectra = [torch.rand(2, heads, 5).double().sort(descending=True).values for _ in range(2)]
    return Analysis([0, 3], moments, values, spectra)


def test_the_table_reads_back_as_what_was_analysed(tmp_path: Path) -> None:
    first, second = toy_analysis(), toy_analysis(heads=4)
    second.spectra[1] = second.spectra[1][..., :3]
    second.values["sigma_ratio"][0, 0, 0, 0] = math.inf
    second.values["sigma_ratio"][1, 1, 2, 3] = math.nan
    analyses = {("b", "text"): first, ("a", "text"): second, ("b", "other"): second}
    write_table(tmp_path / "table.parquet", analyses)
    found = read_table(tmp_path / "table.parquet")
    assert list(found) == list(analyses)
    for key, analysis in analyses.items():
        assert (found[key].layers, found[key].times) == (analysis.layers, analysis.times)
        assert list(found[key].values) == list(analysis.values)
        given = [*analysis.values.values(), *analysis.spectra]
        read = [*found[key].values.values(), *found[key].spectra]
        for one, other in zip(given, read, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)


def test_groups_and_their_stability() -> None:
    analysis = toy_analysis()
    groups = groups_summary(analysis, "stable_rank")
    assert (groups["low_heads"], groups["high_heads"]) == (6, 6)
    assert groups["high"] == [[0, 3], [0, 4], [0, 5], [3, 3], [3, 4], [3, 5]]
    assert groups["over_time"]["tokens"] == 128
    assert groups["over_time"]["same_group"] == 1 and groups["over_time"]["spearman"] > 0.5
    assert groups["separation"] > 0.95


def test_agreement_needs_the_same_heads() -> None:
    ranks, norms = torch.tensor([1.0, 2, 9]), torch.tensor([1.0, 1, 2])
    same = agreement((ranks, norms), (ranks * 3, norms * 2))
    assert same == pytest.approx({"spearman": 1, "norm_cosine": 1, "same_group": 1})
    turned = agreement((ranks, norms), (-ranks, norms))
    assert turned["spearman"] == pytest.approx(-1) and turned["same_group"] == 0
    assert set(agreement((ranks, norms), (ranks[:2], norms[:2])).values()) == {None}
    assert agreement((ranks, norms), (torch.ones(3), norms))["same_group"] is None


@pytest.mark.parametrize("metric", NAMES)
def test_every_metric_can_be_plotted(metric: str) -> None:
    series = Series("toy", toy_analysis())
    for plot in plots(series, metric, series, ("a", series)).values():
        ElementTree.fromstring(svg_file(plot.picture, plot.title))


def test_a_singular_state_leaves_its_cell_empty_and_breaks_nothing() -> None:
    analysis = toy_analysis()
    analysis.values["sigma_ratio"][0, 0, 0] = math.inf
    analysis.values["sigma_ratio"][0, 1, 1] = math.nan
    series = Series("toy", analysis)
    drawn = plots(series, "sigma_ratio", series, ("a", series))
    for plot in drawn.values():
        file = svg_file(plot.picture, plot.title)
        ElementTree.fromstring(file)
        assert "nan" not in file and '"inf' not in file
    assert cells(drawn["heat_map"].picture) == 10 + LEGEND_CELLS


def test_one_token_leaves_out_what_has_no_course() -> None:
    values = {name: torch.full((1, 1, 1, 1), math.inf).double() for name in METRICS}
    analysis = Analysis([0], [1], values, [torch.ones(1, 1, 1)])
    series = Series("toy", analysis)
    assert set(plots(series, "stable_rank", series, ("a", series))) == {
        "heat_map", "heat_map_against",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "rank"], "--metric: unknown 'rank': choose from stable_rank, utilisation"),
        (["--length", "0"], "--length: 0 is not a whole number of at least 1"),
        (["--sequences", "-1"], "--sequences: -1 is not a whole number of at least 1"),
        (["--per-octave", "0"], "--per-octave: 0 is not a whole number of at least 1"),
        (["--epsilon", "1"], "--epsilon: 1 is not a number between 0 and 1"),
        (["--length", "50000", "--sequences", "2"], "--length 50000 need 100,000: give longer"),
        (["--data", "/no/where.txt"], "/no/where.txt"),
        (["--data", ""], "has no recipe that names held-out text: give --data"),
        (["--tokenizer", "/no/where"], "/no/where"),
        (["--against", "/no/model"], "/no/model"),
        (["--against", "{home}/softmax"], "llama is no family with linear-attention layers"),
        (["--second-data", "/no/where.txt"], "/no/where.txt"),
        (["--second-split", "train"], "--second-split needs --second-data"),
    ],
)
def test_bad_input_is_refused_before_work(
    arguments: list[str], message: str, home: Path, tmp_path: Path
) -> None:
    given = ["--data", str(home / "text.jsonl"), *ARGUMENTS, *arguments]
    words = [word.format(home=home) for word in given]
    with pytest.raises(UserError) as error:
        check(STAGE.parse([str(home / "thin"), str(tmp_path / "out"), *words]))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused(home: Path, tmp_path: Path) -> None:
    arguments = [str(home / "thin"), str(tmp_path), "--data", str(home / "text.jsonl"), *ARGUMENTS]
    with pytest.raises(UserError, match="exists: choose another, or pass --overwrite"):
        check(STAGE.parse(arguments))
    check(STAGE.parse([*arguments, "--overwrite"]))
    inside = dataclasses.replace(STAGE.parse(arguments), out=home / "thin" / "analysis")
    with pytest.raises(UserError, match="lies inside the model's folder"):
        check(inside)


def test_a_state_that_is_not_finite_leaves_nothing_behind(home: Path, tmp_path: Path) -> None:
    tensors = weights(DELTA_NET)
    tensors["model.layers.1.attn.k_proj.weight"][32 + 5] = math.nan
    write_hf(tmp_path / "model", DELTA_NET, tensors)
    shutil.copytree(home / "tokenizer", tmp_path / "model", dirs_exist_ok=True)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="^layer 1 head 1: the state after token 1 is not finite"):
        stage(str(tmp_path / "model"), str(out), "--data", str(home / "text.jsonl"), *ARGUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_states_of_bf16_kernels_say_what_is_rounding() -> None:
    said = precision_sentence("bfloat16", "cuda")
    assert "come from GPU kernels that multiply in bfloat16" in said
    assert "--epsilon 0.004 or more" in said
