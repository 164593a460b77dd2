"""Readings of single results: scores, recall, query noise and rank plots as a report shows them."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.drawing.table import Table
from launch.ranks.rank_plots import Plot, Series, plots
from launch.serving.tables import capacity_table, kernels_table

if TYPE_CHECKING:
    from pruning.states.analysis import Analysis


def analysis_plots(
    found: "Mapping[tuple[str, str], Analysis]", metric: str, roles: Sequence[str]
) -> list[Plot]:
    """Return the plots of an analysis, by (model, text), in the colours of `roles`.

    The first entry is the model; `roles` are those of the model and of the other model.
    """
    (model, text), *others = found
    against = second = None
    for name, data in others:
        analysis = found[name, data]
        if name == model:
            second = (text, Series(data, analysis))
        else:
            against = Series(name, analysis, roles[1])
    drawn = plots(Series(model, found[model, text], roles[0]), metric, against, second)
    return [drawn[name] for name in sorted(drawn)]


def noise_by_layer(name: str, heads: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return query noise by layer: the mean of stable ranks, geometric means of the rest."""
    from statistics import fmean, geometric_mean

    layers: dict[int, list[Mapping[str, Any]]] = {}
    for head in heads:
        layers.setdefault(head["layer"], []).append(head)
    return [
        {
            "model": name,
            "layer": layer,
            "stable_rank": fmean(head["stable_rank"] for head in found),
            **{
                key: geometric_mean(head[key] for head in found)
                for key in ("amplification", "random_queries", "error_at_10_percent")
            },
        }
        for layer, found in sorted(layers.items())
    ]


def recall_curves(
    record: Mapping[str, Any],
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return the curves of a record of recall by their heading and the label of their x axis.

    Points are a number of pairs, or the depth of a needle, with the accuracy.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    length = re.search(r"\blength=(\d+)", str(record.get("task", "")))
    size = f" in {length[1]} words" if length else ""
    for cell in record.get("mqar") or ():
        heading = (f"Associative recall (MQAR){size}", "pairs of key and value")
        found.setdefault(heading, []).append((cell["pairs"], cell["accuracy"]))
    for cell in record.get("needle") or ():
        heading = (f"Needle in a haystack of {cell['length']} words", "depth of the needle, %")
        found.setdefault(heading, []).append((cell["depth"], cell["accuracy"]))
    return {heading: sorted(points) for heading, points in found.items()}


def decoding_speeds(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the medians of tokens decoded per second by model, a group for what compares.

    A heading says the batch size, and the device and dtype where the records differ in them. Of two
    records that agree in all, the one with more models counts, or the later.
    """
    found: dict[str, dict[str, float]] = {}
    places = {(record["device_name"], record["dtype"]) for record in records}
    for record in records:
        where = f", {record['device_name']}, {record['dtype']}" if len(places) > 1 else ""
        for measure in (m for m in record["measures"] if m["name"] == "decode"):
            heading = f"decoded tokens/s, batch {measure['batch_size']}{where}"
            speeds = {name: value["median"] for name, value in measure["values"].items()}
            # Speeds of two records were not measured beside each other: no column mixes them.
            if len(speeds) >= len(found.get(heading, {})):
                found[heading] = speeds
    return found


def task_scores(results: Any) -> dict[str, str]:
    """Return scores of lm-eval's `results` as text with standard errors, by task and metric."""
    found: dict[str, str] = {}
    if not isinstance(results, dict):
        return found
    for task, scores in results.items():
        for key, value in scores.items() if isinstance(scores, dict) else ():
            metric, _, kind = key.partition(",")
            if not is_number(value) or not kind or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            spread = f" ± {_score(error, value)}" if is_number(error) and error > 0 else ""
            named = metric if kind == "none" else f"{metric} ({kind})"
            found[f"{task}, {named}"] = _score(value) + spread
    return found


def _score(value: float, beside: float = 0.0) -> str:
    """Return `value` with four decimals, or with two if it or `beside` is 10 or more."""
    return f"{value:.4f}" if max(abs(value), abs(beside)) < 10 else f"{value:,.2f}"


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def capacities(record: Mapping[str, Any], names: Sequence[str]) -> Table:
    """Return the figures of `slimstate capacity` under other names of its models."""
    measures = [
        {**each, "values": dict(zip(names, each["values"].values(), strict=True))}
        for each in record["measures"]
    ]
    return capacity_table(measures, names)


def engines(record: Mapping[str, Any]) -> tuple[list[str], Table]:
    """Return what `slimstate serve-check` said of each engine, and its table of kernels."""
    rows = [kernel for engine in record["engines"] for kernel in engine["kernels"]]
    return record["says"], kernels_table(rows)
