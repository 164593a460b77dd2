"""The report page: self-contained, complete, and honest in its sentences."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flame.errors import UserError
from launch.ranks.spectra import Spectrum
from launch.reporting.data import KeptChannels, ReportData
from launch.reporting.losses import loss_curve, smoothed
from launch.reporting.page import page, write_report
from launch.reporting.sentences import verdict, won_back
from launch.reporting.tables import COLUMNS


def row(perplexity: float, state_bytes: int, tokens_per_second: float = 100.5) -> dict[str, float]:
    return {
        "perplexity": perplexity,
        "bits_per_byte": math.log2(perplexity) / 3,
        "parameters": 1_234_567 - state_bytes,
        "state_bytes": state_bytes,
        "decode_tokens_per_second": tokens_per_second,
    }


ROWS = {
    "dense": row(34.213, 524_288),
    "dense_continued": row(31.077, 524_288, 99.25),
    "pruned": row(37.918, 262_144, 120.75),
    "random": row(58.31, 262_144, 121.5),
    "recovered": row(31.604, 262_144, 119.125),
}

DATA = ReportData(
    title="a <run> & its report",
    rows=ROWS,
    loss_curves={
        "dense": ([1, 2, 3], [9.0, 5.0, 4.0]),
        "recovered": ([1, 2], [3.9, 3.7]),
        "dense_continued": ([1, 2], [3.5, math.nan]),
    },
    spectra={
        "dense": [Spectrum(0, [1.0, 0.5, 0.1, 0.0], 1.26)],
        "recovered": [Spectrum(0, [1.0, 0.4], 1.16)],
    },
    kept=[KeptChannels(0, 4, [[0, 1], [1, 3]])],
    seconds={"pretrain": 200.5, "prune": 3.25, "total": 210.0},
    commands=["slimstate prune a b --ratio 0.5"],
    versions={"torch": "2.13.0"},
    world_size=2,
    seed=7,
)

VOID = {"meta", "br"}


class Nesting(HTMLParser):
    """Collects links that leave the page, and checks that elements close where they opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [
            f"{name}={value}"
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "srcset", "data")
            and not (value or "").startswith("#")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()


def test_page_is_one_well_formed_file_without_references(tmp_path: Path) -> None:
    text = write_report(tmp_path / "report.html", DATA).read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    parser = Nesting()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and parser.links == []
    assert not parser.tags & {"script", "link", "iframe", "img", "object"}
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert "nan" not in text.lower()
    assert "a &lt;run&gt; &amp; its report" in text and "$" not in text


def test_page_shows_every_number_of_the_table() -> None:
    text = page(DATA)
    for values in ROWS.values():
        for column in COLUMNS[1:]:
            assert column.cell(values[column.key]) in text
    for part in ("200.5 s", "3.2 s", "210.0 seconds", "2 processes", "2.13.0", "--ratio 0.5"):
        assert part in text
    assert '<span class="m-dense">dense 1.3 of 4</span>' in text
    assert '<span class="m-recovered">recovered 1.2 of 2</span>' in text
    assert "Layer 0: 2 of 4 channels a head" in text


def test_page_of_the_table_alone_has_no_empty_sections() -> None:
    text = page(ReportData("t", {"dense": row(10.0, 1024)}))
    assert "One model, not pruned: perplexity 10.00." in text
    assert "what it cost was not measured" in page(ReportData("t", {"dense": {}, "pruned": {}}))
    for heading in ("Training loss", "Singular values", "Kept key channels", "Where the time"):
        assert heading not in text


def test_missing_and_infinite_numbers_are_shown_as_such() -> None:
    broken = {**ROWS, "random": {**ROWS["random"], "perplexity": math.inf}, "pruned": {}}
    text = page(replace(DATA, rows=broken))
    assert "channels chosen by" not in text
    assert "won back" not in text
    assert '<td class="right">-</td>' in text


def test_existing_report_is_kept_unless_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        write_report(path, DATA)
    assert path.read_text() == "mine"
    write_report(path, DATA, overwrite=True)
    assert path.read_text() != "mine"


def test_verdict_says_what_recovery_did() -> None:
    half = "Pruning took 50% off the recurrent state (512 KiB to 256 KiB a sequence)"
    assert verdict(ROWS) == (
        f"{half} and cost 1.7% in perplexity after recovery: perplexity 31.60 against 31.08 of "
        "the dense model trained on for as many tokens."
    )
    better = {**ROWS, "recovered": row(30.5, 262_144)}
    assert "nothing in quality: perplexity 30.50 against 31.08" in verdict(better)
    worse = {**ROWS, "recovered": row(39.0, 262_144)}
    assert "recovery did not recover" in verdict(worse)
    assert "37.92 before recovery" in verdict(worse)
    alone = {name: ROWS[name] for name in ("dense", "recovered")}
    assert verdict(alone).endswith(
        "nothing in quality: perplexity 31.60 against 34.21 of the dense model."
    )


def test_won_back_is_a_share_of_the_loss() -> None:
    rows = {"dense": row(math.e, 8), "pruned": row(math.e**3, 4), "recovered": row(math.e**1.5, 4)}
    assert won_back(rows) == pytest.approx(0.75)
    assert won_back({**rows, "pruned": row(2.0, 4)}) is None
    assert won_back({"dense": row(2.0, 4)}) is None


def test_random_control_that_wins_is_reported() -> None:
    lucky = {**ROWS, "random": row(36.0, 262_144)}
    assert "no better than as many chosen at random: 37.92 against 36.00" in page(
        replace(DATA, rows=lucky)
    )


def test_perplexity_bars_turn_logarithmic_when_one_dwarfs_the_rest() -> None:
    assert "The axis starts at 0." in page(DATA)
    huge = page(replace(DATA, rows={**ROWS, "random": row(31.077**2, 262_144)}))
    assert "logarithmic and starts at 1" in huge
    assert 'left:50.00%"' in huge


def test_many_layers_are_folded_away_and_none_is_lost() -> None:
    kept = [KeptChannels(layer, 4, [[0, 1]]) for layer in range(24)]
    text = page(replace(DATA, kept=kept))
    assert "The other 16 layers" in text
    shown, folded = text.split("<details>")
    assert "Layer 0: 2 of 4" in shown and "Layer 23: 2 of 4" in shown
    assert all(f"<h3>Layer {layer}: 2 of 4" in text for layer in range(24))


def test_loss_curve_reads_a_resumed_run(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for attempt, (steps, base) in enumerate([((1, 2, 3), 5.0), ((3, 4), 1.0)]):
        writer = SummaryWriter(str(tmp_path / "tb" / f"2025010{attempt}-0000"))
        for step in steps:
            writer.add_scalar(
                "loss_metrics/global_avg_loss", base + step, step, walltime=10.0 * attempt + step
            )
        writer.close()
    assert loss_curve(tmp_path) == ([1, 2, 3, 4], [6.0, 7.0, 4.0, 5.0])


def test_run_without_a_loss_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no loss curve"):
        loss_curve(tmp_path)


def test_smoothing_keeps_lines_and_passes_over_nan() -> None:
    line = [float(value) for value in range(10)]
    assert smoothed(line, 2)[:8] == line[:8]
    assert smoothed([1.0, math.nan, 3.0], 1) == [1.0, 2.0, 3.0]
