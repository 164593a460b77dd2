"""The report page: self-contained, complete, and honest in its sentences."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame.errors import UserError
from launch.ranks.spectra import Spectrum
from launch.reporting.claims import details, verdict
from launch.reporting.data import KeptChannels, Measured, ReportData
from launch.reporting.lineage import Lineage
from launch.reporting.losses import loss_curve, smoothed
from launch.reporting.page import page, write_report

LOSSES = {
    "dense": 3.5, "dense_continued": 3.4, "pruned": 3.62, "random": 4.1, "recovered": 3.42,
}  # fmt: skip
STATES = {"dense": 524_288, "dense_continued": 524_288}
SPEED = "decoded tokens/s, batch 8"


def documents(loss: float, seed: int, noise: float = 0.004) -> dict[str, list[float]]:
    """Losses of 40 documents of 100 tokens whose mean loss is about `loss`."""
    hard = np.random.default_rng(0).normal(0, 0.5, 40)
    own = np.random.default_rng(seed).normal(0, noise, 40)
    losses = 100 * (loss + hard - hard.mean() + own - own.mean())
    return {"losses": losses.tolist(), "tokens": [100] * 40}


def record(loss: float, seed: int, noise: float = 0.004) -> dict[str, Any]:
    return {
        "perplexity": math.exp(loss), "bits_per_byte": loss / 2, "error": 0.375,
        "documents": documents(loss, seed, noise), "tokens": 4000,
    }  # fmt: skip


def texts(**losses: float) -> list[Measured]:
    records = {name: record(loss, seed) for seed, (name, loss) in enumerate(losses.items(), 1)}
    return [Measured("/data/held.txt", 512, 4000, records)]


LINEAGES = {
    "dense": Lineage("dense", text="trained for 600 steps"),
    "dense_continued": Lineage("dense_continued", "dense", None, 120, 245_760, "trained on"),
    "pruned": Lineage("pruned", "dense", "pruned", 0, 0, "pruned by drrqr from dense"),
    "random": Lineage("random", "dense", "random", 0, 0, "pruned by random from dense"),
    "recovered": Lineage("recovered", "pruned", "pruned", 120, 245_760, "trained on from pruned"),
}

DATA = ReportData(
    title="a <run> & its report",
    rows={
        name: {
            "parameters": 1_234_567 - STATES.get(name, 262_144),
            "state_bytes": STATES.get(name, 262_144),
            SPEED: 100.5 + number,
        }
        for number, name in enumerate(LINEAGES)
    },
    lineages=LINEAGES,
    states={"pruned": (524_288, 262_144), "random": (524_288, 262_144)},
    texts=texts(**LOSSES),
    speeds=[SPEED],
    plans={"pruned": {"method": "drrqr"}, "random": {"method": "random"}},
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
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
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


def test_page_shows_every_number_of_the_tables() -> None:
    text = page(DATA)
    for name, row in DATA.rows.items():
        for value in (f"{row['parameters']:,}", f"{row['state_bytes']:,}", f"{row[SPEED]:,.1f}"):
            assert value in text
        measured = DATA.texts[0].records[name]
        assert f"{measured['perplexity']:,.3f}" in text and LINEAGES[name].text in text
    for part in ("200.5 s", "3.2 s", "210.0 seconds", "2 processes", "2.13.0", "--ratio 0.5"):
        assert part in text
    assert "Held-out perplexity on held.txt, rows of 512 tokens, 4,000 of them predicted" in text
    assert '<span class="m-dense">dense 1.3 of 4</span>' in text
    assert '<span class="m-recovered">recovered 1.2 of 2</span>' in text
    assert "Layer 0: 2 of 4 channels a head" in text


def test_page_of_the_table_alone_has_no_empty_sections() -> None:
    alone = ReportData("t", {"mine": {"state_bytes": 1024}}, texts=texts(mine=2.5))
    text = page(alone)
    assert "12.182" in text and 'class="verdict"' not in text
    for heading in ("Training loss", "Singular values", "Kept key channels", "Where the time"):
        assert heading not in text
    assert "What the numbers say" not in text


def test_infinite_numbers_are_shown_as_such() -> None:
    broken = {**DATA.texts[0].records["random"], "perplexity": math.inf, "documents": None}
    records = {**DATA.texts[0].records, "random": broken}
    text = page(replace(DATA, texts=[replace(DATA.texts[0], records=records)]))
    assert "at random" not in text
    assert '<td class="right">inf</td>' in text


def test_existing_report_is_kept_unless_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        write_report(path, DATA)
    assert path.read_text() == "mine"
    write_report(path, DATA, overwrite=True)
    assert path.read_text() != "mine"


def test_verdict_compares_with_the_control_that_was_trained_as_long() -> None:
    assert verdict(DATA).startswith(
        "Pruning takes 50% off the recurrent state of a sequence (512 KiB to 256 KiB). "
        "recovered loses 0.0200 nats a token more (95 % interval 0.0"
    )
    assert verdict(DATA).endswith(
        "than dense_continued, the dense model trained on for as many tokens (245,760): "
        "perplexity 30.57 and 29.96."
    )
    better = replace(DATA, texts=texts(**{**LOSSES, "recovered": 3.3}))
    assert "loses 0.1000 nats a token less" in verdict(better)


def test_a_difference_within_chance_is_called_that() -> None:
    records = {**DATA.texts[0].records, "recovered": record(3.402, 9, noise=0.1)}
    said = verdict(replace(DATA, texts=[replace(DATA.texts[0], records=records)]))
    assert "recovered cannot be told apart from dense_continued" in said
    assert "on 40 documents: +0.0020 [-0.0" in said


def without(*names: str) -> ReportData:
    found = {name: its for name, its in LINEAGES.items() if name not in names}
    records = {n: r for n, r in DATA.texts[0].records.items() if n not in names}
    return replace(DATA, lineages=found, texts=[replace(DATA.texts[0], records=records)])


def test_a_claim_needs_its_control_its_tokens_and_an_interval() -> None:
    # No control that was trained on: nothing is said of the recovered model.
    alone = without("dense_continued")
    assert "pruned, not trained on, loses 0.1200 nats a token more" in verdict(alone)
    assert not any("recovered" in sentence for sentence in [verdict(alone), *details(alone)])
    # A control that was trained for other, or unknown, tokens.
    for tokens in (122_880, None):
        control = replace(LINEAGES["dense_continued"], tokens=tokens)
        other = replace(DATA, lineages={**LINEAGES, "dense_continued": control})
        assert "recovered" not in verdict(other)
    # Too few documents, or none recorded: numbers alone.
    few = {"losses": [300.0] * 3, "tokens": [100] * 3}
    for cut in (few, None):
        records = {n: {**r, "documents": cut} for n, r in DATA.texts[0].records.items()}
        numbers = replace(DATA, texts=[replace(DATA.texts[0], records=records)])
        assert verdict(numbers).endswith("What it cost is not measured against a control.")
        assert details(numbers) == [] and "30.569" in page(numbers)
    # Models of which nothing is known are not compared, whatever they are called.
    strangers = replace(DATA, lineages={name: Lineage() for name in LINEAGES}, states={})
    assert verdict(strangers) == "" and details(strangers) == []
    assert '<dl class="tiles">' not in page(strangers)
    # Nor are models of different texts.
    one = [Measured("a", 512, 4000, {n: r}) for n, r in DATA.texts[0].records.items()]
    assert "nats" not in verdict(replace(DATA, texts=one))


def test_what_training_on_won_back_is_of_the_gap_to_the_control() -> None:
    (sentence,) = [said for said in details(DATA) if "closed" in said]
    # (3.62 - 3.42) / (3.62 - 3.40)
    assert sentence.startswith("Training on closed 91 % (95 % interval 9")
    assert "of the gap between pruned and dense_continued" in sentence


def test_a_rise_of_the_divergence_is_said() -> None:
    fidelity = {
        name: {"kl": kl, "against": "runs/dense", "documents": documents(kl, seed)}
        for seed, (name, kl) in enumerate({"pruned": 0.022, "recovered": 0.047}.items())
    }
    (said,) = [text for text in details(replace(DATA, fidelity=fidelity)) if "KL" in text]
    assert "away from those of the dense model: KL 0.0220 nats a token of pruned, 0.0470" in said
    assert "(+0.0250 [+0.02" in said
    other = {**fidelity, "recovered": {**fidelity["recovered"], "against": "elsewhere"}}
    assert not [text for text in details(replace(DATA, fidelity=other)) if "KL" in text]


def test_the_random_control_is_compared_at_the_same_size() -> None:
    (said,) = [text for text in details(DATA) if "at random" in text]
    assert said.startswith("Not trained on, pruned (channels chosen by drrqr) loses 0.4800 nats")
    assert "less (0.4" in said and said.endswith("than random, one draw of as many at random.")
    lucky = replace(DATA, texts=texts(**{**LOSSES, "random": 3.5}))
    assert any("loses 0.1200 nats a token more" in said for said in details(lucky))
    wider = replace(DATA, states={**DATA.states, "random": (524_288, 131_072)})
    assert not [text for text in details(wider) if "at random" in text]


def test_perplexity_bars_turn_logarithmic_when_one_dwarfs_the_rest() -> None:
    assert "The axis starts at 0." in page(DATA)
    huge = page(replace(DATA, texts=texts(**{**LOSSES, "random": 6.8})))
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
