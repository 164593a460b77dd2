"""What a state-rank analysis leaves behind: a table in Parquet, a summary in JSON, plots in SVG."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.storage.json_file import write_object
from launch.drawing.figure import svg_file
from launch.ranks.rank_plots import Plot

if TYPE_CHECKING:
    from torch import Tensor

    from pruning.states.analysis import Analysis

TABLE_FILE = "analysis.parquet"
SUMMARY_FILE = "summary.json"

RANKS = ("stable_rank", "threshold_rank", "entropy_rank")
"""The definitions of rank by which heads are grouped; utilisation orders them as stable rank."""

EARLY = 128
"""Tokens after which arXiv 2602.02195 compares heads with those at the end."""


def write_analysis(
    folder: Path,
    analyses: "Mapping[tuple[str, str], Analysis]",
    summary: Mapping[str, Any],
    drawn: Mapping[str, Plot],
) -> None:
    """Write all files of an analysis into `folder`.

    Args:
        analyses: by the names of a model and of a text, as they stand in the table.
        summary: what `SUMMARY_FILE` holds.
        drawn: the plots by name.
    """
    write_table(folder / TABLE_FILE, analyses)
    write_object(folder / SUMMARY_FILE, _without_nan(summary), ensure_ascii=False, allow_nan=False)
    for name, plot in drawn.items():
        file = folder / f"{name}.svg"
        file.write_text(svg_file(plot.picture, plot.title), encoding="utf-8")


def write_table(path: Path, analyses: "Mapping[tuple[str, str], Analysis]") -> None:
    """One row for each model, text, sequence, layer, head and time.

    `singular_values` is there for the last time and null before.
    """
    import pyarrow
    from pyarrow import parquet

    tables = [
        pyarrow.table(_columns(model, data, analysis))
        for (model, data), analysis in analyses.items()
    ]
    parquet.write_table(pyarrow.concat_tables(tables), path, compression="zstd")


def read_table(path: Path) -> "dict[tuple[str, str], Analysis]":
    """The analyses that `write_table` wrote, by the names of model and text, in its order."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    keys = zip(table["model"].to_pylist(), table["data"].to_pylist(), strict=True)
    return {
        (model, data): _analysis(table.filter(_is("model", model) & _is("data", data)))
        for model, data in dict.fromkeys(keys)
    }


def _analysis(rows: Any) -> "Analysis":
    """The analysis whose rows of the table these are."""
    import torch

    from pruning.states.analysis import Analysis

    sequences, layers, heads, times = (
        rows[name].unique().to_pylist() for name in ("sequence", "layer", "head", "tokens")
    )
    shape = (len(sequences), len(layers), len(heads), len(times))
    metrics = rows.column_names[rows.column_names.index("tokens") + 1 : -1]
    values = {name: torch.tensor(rows[name].to_numpy()).view(shape) for name in metrics}
    spectra = []
    for layer in layers:
        states = rows.filter(_is("layer", layer))["singular_values"].drop_null().to_pylist()
        spectra.append(torch.tensor(states, dtype=torch.float64).unflatten(0, shape[0:3:2]))
    return Analysis(layers, times, values, spectra)


def _is(column: str, value: Any) -> Any:
    from pyarrow import compute

    return compute.field(column) == value


def _columns(model: str, data: str, analysis: "Analysis") -> dict[str, Any]:
    import numpy as np
    import pyarrow

    shape = tuple(analysis.values["beta"].shape)
    sequence, layer, head, time = np.indices(shape).reshape(4, -1)
    last = [
        analysis.spectra[i][s, h].tolist() if t == shape[-1] - 1 else None
        for s, i, h, t in np.ndindex(shape)
    ]
    return {
        "model": [model] * len(last),
        "data": [data] * len(last),
        "sequence": sequence,
        "layer": np.array(analysis.layers)[layer],
        "head": head,
        "tokens": np.array(analysis.times)[time],
        **{name: values.flatten().numpy() for name, values in analysis.values.items()},
        "singular_values": pyarrow.array(last, pyarrow.list_(pyarrow.float64())),
    }


def model_summary(analysis: "Analysis") -> dict[str, Any]:
    """Means by layer after the last token, and the groups of heads by every definition of rank."""
    return {
        "heads": analysis.values["beta"].shape[2],
        "singular_values_a_state": [values.shape[-1] for values in analysis.spectra],
        "layers": layer_means(analysis),
        "groups": {rank: groups_summary(analysis, rank) for rank in RANKS},
    }


def layer_means(analysis: "Analysis") -> list[dict[str, Any]]:
    """Every metric after the last token over sequences and heads, a row for each layer.

    It is the mean, or the median for `sigma_ratio`, which a single head can make infinite.
    """
    import torch

    means = {}
    for name, values in analysis.values.items():
        last = values[..., -1].transpose(0, 1).flatten(1)
        ratio = name == "sigma_ratio"
        means[name] = (torch.median(last, 1).values if ratio else last.mean(1)).tolist()
    return [
        {"layer": layer, **{name: column[place] for name, column in means.items()}}
        for place, layer in enumerate(analysis.layers)
    ]


def groups_summary(analysis: "Analysis", rank: str) -> dict[str, Any]:
    """The heads of low and of high rank after the last token, and whether they were so before."""
    from pruning.state_rank import split

    groups = split(analysis.mean(rank).flatten())
    heads = analysis.values[rank].shape[2]
    high = groups.high.nonzero().flatten().tolist()
    early = max(place for place, time in enumerate(analysis.times) if time <= EARLY)
    return {
        "bound": groups.bound,
        "separation": groups.separation,
        "low_heads": len(groups.high) - len(high),
        "high_heads": len(high),
        "high": [[analysis.layers[index // heads], index % heads] for index in high],
        "over_time": {
            "tokens": analysis.times[early],
            **agreement(_states(analysis, rank, early), _states(analysis, rank, -1)),
        },
    }


def compared(analysis: "Analysis", other: "Analysis") -> dict[str, Any]:
    """How far two analyses agree after the last token, by every definition of rank.

    Values are None where the numbers of heads differ.
    """
    return {
        rank: agreement(_states(analysis, rank, -1), _states(other, rank, -1)) for rank in RANKS
    }


def agreement(a: "tuple[Tensor, Tensor]", b: "tuple[Tensor, Tensor]") -> dict[str, Any]:
    """Agreement of two pairs of heads' ranks and nuclear norms, each [heads of all layers].

    `spearman` of the ranks, `norm_cosine` of the norms, and `same_group`, the share of heads that
    both put into the same group; null where the numbers of heads differ or nothing varies.
    """
    from pruning.state_rank import cosine, spearman, split

    if a[0].shape != b[0].shape:
        return {"spearman": None, "norm_cosine": None, "same_group": None}
    first, second = split(a[0]), split(b[0])
    is_split = math.isfinite(first.bound) and math.isfinite(second.bound)
    same = float((first.high == second.high).double().mean()) if is_split else None
    return {
        "spearman": spearman(a[0], b[0]),
        "norm_cosine": cosine(a[1], b[1]),
        "same_group": same,
    }


def _states(analysis: "Analysis", rank: str, time: int) -> "tuple[Tensor, Tensor]":
    return analysis.mean(rank, time).flatten(), analysis.mean("nuclear_norm", time).flatten()


def _without_nan(value: Any) -> Any:
    """`value` with null for floats that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
