"""What a report shows: plain data, read from files or handed over by a program that measured it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.ranks.rank_plots import Plot
from launch.ranks.spectra import Spectrum
from launch.reporting.sentences import Row

Scores = Mapping[str, Mapping[str, float | str | None]]
"""Scores by quantity, then by model."""


@dataclass(frozen=True)
class KeptChannels:
    """What one layer kept of its key channels, value channels or heads."""

    layer: int
    head_dim: int
    """Channels that a head had before pruning, or heads that a layer had."""

    kept: Sequence[Sequence[int]]
    """For each key head the kept channels, in increasing order; one row for the other kinds."""

    kind: Literal["key", "value", "head"] = "key"


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


@dataclass(frozen=True)
class ReportData:
    """What a report shows; whatever is empty is left out of the page."""

    title: str
    rows: Mapping[str, Row]
    """The keys of `tables.COLUMNS`, by model (`sentences.LABELS`)."""

    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By pruned model: how its channels were chosen, as a reader sees it."""

    tasks: Scores = field(default_factory=dict)
    fidelity: Scores = field(default_factory=dict)
    """Distances to the dense model on held-out text."""

    recall: Sequence[Recall] = ()
    query_noise: Sequence[Mapping[str, Any]] = ()
    """A row for each model and layer: the keys of `launch.reporting.tables.NOISE_COLUMNS`."""

    ranks: Sequence[RankAnalysis] = ()
    bench: Sequence[Mapping[str, Any]] = ()
    """What `launch.bench.benchmark` returned, or its JSON."""

    sweeps: Sequence[Mapping[str, Any]] = ()
    """What `slimstate sweep` left as results.json."""

    loss_curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """By model: steps and training losses in nats per token. `dense` is pretraining."""

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
