"""Methods beside each other and beside a reference method, over one model or several.

A figure of several models is of the mean of their sums by document, so that each model counts as
much as another; its spread is the standard deviation over models. Intervals are of a bootstrap over
documents, the same draws for all methods and models: they say nothing of other models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from launch.evaluation.intervals import DocumentLosses, Estimate, quotient
from launch.sweeping.points import Point

ALL = "all models"
STAGES = ("before", "recovered")


@dataclass(frozen=True)
class Key:
    """A row of tables."""

    method: str
    space: str
    ratio: str
    own_ratio: bool


@dataclass(frozen=True)
class Measured:
    """Sums by document of one model in one stage; of methods that draw, means over their seeds."""

    losses: DocumentLosses
    divergences: DocumentLosses


@dataclass(frozen=True)
class ModelPoints:
    """What a sweep measured of one model."""

    name: str
    group: str
    points: Mapping[Key, Mapping[str, Measured]]
    """By stage."""

    removed: Mapping[Key, float]
    """The part of the state that is gone, where it is known."""

    controls: Mapping[str, DocumentLosses]
    """Losses of the dense model by stage; of `recovered` those of the dense model trained on."""


def points_of(
    name: str,
    group: str,
    points: Sequence[Point],
    records: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, Mapping[str, Any]],
) -> ModelPoints:
    """Read the records of a model's points, given by file name, and of its controls by stage."""
    by_key: dict[Key, list[Mapping[str, Any]]] = {}
    for point in points:
        if point.file_name in records:
            key = Key(point.method, point.space, point.ratio, point.own_ratio)
            by_key.setdefault(key, []).append(records[point.file_name])
    found: dict[Key, dict[str, Measured]] = {}
    for key, drawn in by_key.items():
        found[key] = {
            stage: Measured(
                mean([_sums(record[stage], "documents") for record in drawn]),
                mean([_sums(record[stage], "divergences") for record in drawn]),
            )
            for stage in STAGES
            if all(stage in record for record in drawn)
        }
    losses = {stage: _sums(each, "documents") for stage, each in controls.items() if each}
    dense = controls["before"].get("state_bytes")
    removed = {
        key: 1 - drawn[0]["before"]["state_bytes"] / dense
        for key, drawn in by_key.items()
        if dense and drawn[0]["before"]["state_bytes"]
    }
    return ModelPoints(name, group, found, removed, losses)


def compare(models: Sequence[ModelPoints], reference: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each group of models, method, ratio and stage that all models of the group have.

    Args:
        reference: methods to compare with; of each row the first that its space and ratio have.
    """
    groups: dict[str, list[ModelPoints]] = {}
    for model in models:
        groups.setdefault(model.group, []).append(model)
    if len(groups) > 1:
        groups = {ALL: list(models), **groups}
    return [row for name, group in groups.items() for row in _rows(name, group, reference)]


def _rows(
    name: str, models: Sequence[ModelPoints], reference: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for key in models[0].points:
        for stage in STAGES:
            mine = _measured(models, key, stage)
            controls = [model.controls[stage] for model in models if stage in model.controls]
            # Sums over other documents do not average.
            if mine is None or len(controls) < len(models) or not _alike(controls):
                continue
            row = {"group": name, **vars(key), "stage": stage, "models": len(models)}
            row["removed"] = models[0].removed.get(key)
            rises = [_less(m.losses, c) for m, c in zip(mine, controls, strict=True)]
            row |= _figures("rise", rises, controls)
            row |= _figures("kl", [np.array(m.divergences.losses) for m in mine], controls)
            found = _reference(models, key, stage, reference)
            if found is not None:
                row |= _beside(mine, *found, controls)
            yield row


def _measured(models: Sequence[ModelPoints], key: Key, stage: str) -> list[Measured] | None:
    """What was measured of each of the models; None if one lacks it."""
    found = [m.points[key][stage] for m in models if stage in m.points.get(key, {})]
    return found if len(found) == len(models) else None


def _reference(
    models: Sequence[ModelPoints], key: Key, stage: str, methods: Sequence[str]
) -> tuple[str, list[Measured]] | None:
    """The first of `methods` that all models have where `key` is, unless it is that of `key`."""
    for method in methods:
        if method == key.method:
            return None
        found = _measured(models, Key(method, key.space, key.ratio, key.own_ratio), stage)
        if found is not None:
            return method, found
    return None


def _figures(
    what: str, sums: Sequence[Any], tokens: Sequence[DocumentLosses]
) -> dict[str, float | None]:
    """A mean over tokens with its interval, and its spread over models."""
    found = quotient(np.mean(sums, axis=0), tokens[0].tokens)
    each = [float(own.sum()) / sum(tokens[0].tokens) for own in sums]
    return _named(what, found) | {f"{what}_spread": stdev(each) if len(each) > 1 else None}


def _beside(
    mine: Sequence[Measured],
    reference: str,
    theirs: Sequence[Measured],
    controls: Sequence[DocumentLosses],
) -> dict[str, Any]:
    """Ratios to the reference's rise and divergence, and for how many models they are sure."""
    rises = [
        tuple(_less(each.losses, control) for each in pair)
        for *pair, control in zip(mine, theirs, controls, strict=True)
    ]
    kls = [
        tuple(np.array(each.divergences.losses) for each in pair)
        for pair in zip(mine, theirs, strict=True)
    ]
    row: dict[str, Any] = {"reference": reference}
    for what, pairs in (("rise", rises), ("kl", kls)):
        row |= _ratios(what, pairs, controls[0].tokens)
    return row


def _ratios(what: str, pairs: Sequence[Any], tokens: Sequence[int]) -> dict[str, Any]:
    """Of pairs, one a model, of sums by document: of a method and of the reference."""
    ours, theirs = (np.mean([pair[side] for pair in pairs], axis=0) for side in (0, 1))
    signs = [quotient(own - other, tokens).sign for own, other in pairs]
    each = (_ratio(own, other, tokens) for own, other in pairs)
    ratios = [ratio.value for ratio in each if ratio is not None]
    return {
        **_named(f"{what}_ratio", _ratio(ours, theirs, tokens)),
        f"{what}_worst": max(ratios) if len(ratios) == len(pairs) else None,
        f"{what}_sign": quotient(ours - theirs, tokens).sign,
        f"{what}_ahead": signs.count(-1),
        f"{what}_behind": signs.count(1),
    }


def _ratio(ours: Any, theirs: Any, tokens: Sequence[int]) -> Estimate | None:
    """The ratio of two rises; None unless the reference's is surely one."""
    return quotient(ours, theirs) if quotient(theirs, tokens).sign > 0 else None


def _named(what: str, found: Estimate | None) -> dict[str, float | None]:
    value, low, high = (None,) * 3 if found is None else (found.value, found.low, found.high)
    return {what: value, f"{what}_low": low, f"{what}_high": high}


def _less(one: DocumentLosses, other: DocumentLosses) -> Any:
    return np.array(one.losses) - np.array(other.losses)


def _alike(found: Sequence[DocumentLosses]) -> bool:
    return all(list(each.tokens) == list(found[0].tokens) for each in found)


def mean(found: Sequence[DocumentLosses]) -> DocumentLosses:
    """Sums by document averaged, over the same documents."""
    return DocumentLosses(
        [fmean(each) for each in zip(*(f.losses for f in found), strict=True)], found[0].tokens
    )


def _sums(record: Mapping[str, Any], what: str) -> DocumentLosses:
    return DocumentLosses(record[what]["losses"], record[what]["tokens"])
