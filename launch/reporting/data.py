"""What a report shows: plain data, read from files or handed over by a program that measured it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from launch.drawing.table import Table
from launch.ranks.rank_plots import Plot
from launch.ranks.spectra import Spectrum
from launch.reporting.lineage import Lineage, colours

Row = Mapping[str, Any]

Scores = Mapping[str, Mapping[str, float | str | None]]
"""Scores by quantity, then by model."""


@dataclass(frozen=True)
class KeptChannels:
    """What one layer kept of its key channels, value channels, heads or value heads."""

    layer: int
    head_dim: int
    """Before pruning: channels of a head, heads of a layer, or value heads of a group."""

    kept: Sequence[Sequence[int]]
    """For each key head the kept channels, in increasing order; one row for the other kinds."""

    kind: Literal["key", "value", "head", "value-head"] = "key"


@dataclass(frozen=True)
class Measured:
    """Perplexity of models on one held-out text, in rows of one length, over the same tokens."""

    data: str
    seq_len: int | None
    tokens: int | None
    records: Mapping[str, Mapping[str, Any]]
    """By model: `perplexity`, `bits_per_byte`, `error`, `documents` of `slimstate eval`."""

    @property
    def heading(self) -> str:
        """The text as a reader sees it."""
        rows = "" if self.seq_len is None else f", rows of {self.seq_len:,} tokens"
        counted = "" if self.tokens is None else f", {self.tokens:,} of them predicted"
        return f"Held-out perplexity on {Path(self.data).name or 'a text'}{rows}{counted}"


@dataclass(frozen=True)
class Recall:
    """Accuracy of recall against what makes it hard, for some models."""

    heading: str
    x_label: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """By model: e.g. numbers of pairs, and accuracies from 0 to 1."""

    chance: float | None = None
    """Accuracy of guessing."""


@dataclass(frozen=True)
class RankAnalysis:
    """Ranks of a model's states, beside another one's: what `slimstate analyze` wrote."""

    heading: str
    note: str
    layers: Sequence[Mapping[str, Any]]
    """A row for each model and layer: `model`, `layer`, and the means of the metrics."""

    plots: Sequence[Plot] = ()


@dataclass
class Results:
    """What result files hold, by the names of the runs."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: list[Measured] = field(default_factory=list)
    fidelity: dict[str, dict[str, Any]] = field(default_factory=dict)
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)
    """Decoded tokens per second by model, under a heading that says batch and device."""
    recall: list[Recall] = field(default_factory=list)
    query_noise: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ranks: list[RankAnalysis] = field(default_factory=list)
    spectra: dict[str, list[Spectrum]] = field(default_factory=dict)
    bench: list[dict[str, Any]] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    serving: dict[str, tuple[Sequence[str], Table]] = field(default_factory=dict)
    """By heading: sentences and a table of `slimstate capacity` or `serve-check`."""
    seconds: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    world_size: int | None = None
    seed: int | None = None
    files: list[Path] = field(default_factory=list)
    """Files that added something; one that only replaced older values may be missing."""


@dataclass(frozen=True)
class ReportData:
    """What a report shows; whatever is empty is left out of the page."""

    title: str
    rows: Mapping[str, Row]
    """By model: `parameters`, `state_bytes`, and speeds by the headings in `speeds`."""

    lineages: Mapping[str, Lineage] = field(default_factory=dict)
    """How each model came about, as far as fingerprints and plans tell."""

    states: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By pruned model: bytes of a sequence's state before and after, as its plan says."""

    texts: Sequence[Measured] = ()
    """Perplexities, the text with the most models first."""

    speeds: Sequence[str] = ()
    """Headings of columns of decoding speed, each of one benchmark and one batch size."""

    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By pruned model: how its channels were chosen, as a reader sees it."""

    tasks: Scores = field(default_factory=dict)
    fidelity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By model: its distance to another one on held-out text, the record of `slimstate eval`."""

    recall: Sequence[Recall] = ()
    query_noise: Sequence[Mapping[str, Any]] = ()
    """A row for each model and layer: the keys of `launch.reporting.tables.NOISE_COLUMNS`."""

    ranks: Sequence[RankAnalysis] = ()
    bench: Sequence[Mapping[str, Any]] = ()
    """What `launch.bench.benchmark` returned, or its JSON."""

    sweeps: Sequence[Mapping[str, Any]] = ()
    """What `slimstate sweep` left as results.json."""

    serving: Mapping[str, tuple[Sequence[str], Table]] = field(default_factory=dict)
    """By heading: sentences and a table of `slimstate capacity` or `serve-check`."""

    loss_curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """By model: steps and training losses in nats per token."""

    spectra: Mapping[str, Sequence[Spectrum]] = field(default_factory=dict)
    """By model, the one before pruning first: one for each layer with a recurrent state."""

    kept: Sequence[KeptChannels] = ()
    method: str = "drrqr"
    """The method that chose the kept channels; empty without a plan."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds by stage; `total` is written, not drawn."""

    commands: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    """Whatever else belongs to the record: data, sequence length, batch of the decoding."""

    world_size: int | None = 1
    """Processes of all stages; None where they are not known."""

    seed: int | None = 0

    def colour(self, name: str) -> str:
        """Return the role of a model's colour: its kind's, or one of its own if that is taken."""
        return self._colours.get(name, "other")

    @cached_property
    def _colours(self) -> dict[str, str]:
        return colours(self.lineages, self.rows)
