"""What the numbers of a run say, in sentences, also where pruning or recovery failed."""

import math
from collections.abc import Mapping

LABELS = {
    "dense": "dense",
    "dense_continued": "dense, trained on",
    "pruned": "pruned",
    "random": "pruned at random",
    "recovered": "recovered",
}
"""The models of a report in their order, as a reader sees them."""

Row = Mapping[str, float | None]


def verdict(rows: Mapping[str, Row]) -> str:
    """Return one sentence on what pruning saved and what it cost after recovery, as measured."""
    if not {"pruned", "random", "recovered"} & set(rows):
        return _without_pruning(rows)
    recovered, control = perplexity(rows, "recovered"), control_of(rows)
    dense = perplexity(rows, control) if control else None
    if dense is not None and recovered is None and (pruned := perplexity(rows, "pruned")):
        change = change_text(dense, pruned)
        return (
            f"{_saving(rows)}; before recovery perplexity is {short(pruned)} against "
            f"{short(dense)} of {described(control)} ({change})."
        )
    if recovered is None or control is None or dense is None:
        return f"{_saving(rows)}; what it cost was not measured."
    against = f"perplexity {short(recovered)} against {short(dense)} of {described(control)}"
    pruned = perplexity(rows, "pruned")
    if recovered <= dense:
        return f"{_saving(rows)} and, after recovery, nothing in quality: {against}."
    cost = f"{percent(recovered / dense - 1)} in perplexity"
    if pruned is not None and recovered >= pruned:
        return (
            f"{_saving(rows)}, and recovery did not recover: {against}, "
            f"and {short(pruned)} before recovery."
        )
    return f"{_saving(rows)} and cost {cost} after recovery: {against}."


def _without_pruning(rows: Mapping[str, Row]) -> str:
    """Return the verdict where no row is known to be a pruned model."""
    measured = {name: value for name in rows if (value := perplexity(rows, name)) is not None}
    if not measured:
        return f"{_unpruned(len(rows))}; perplexity was not measured."
    best = min(measured, key=lambda name: measured[name])
    lowest = "perplexity" if len(measured) == 1 else "the lowest perplexity is"
    of = "" if len(measured) == 1 else f", of {LABELS.get(best, best)}"
    return f"{_unpruned(len(rows))}: {lowest} {short(measured[best])}{of}."


def _unpruned(count: int) -> str:
    return "One model, not pruned" if count == 1 else f"{count} models, none of them pruned"


def won_back(rows: Mapping[str, Row]) -> float | None:
    """Return the share of the loss added by pruning that recovery took back; None if unknown."""
    control = control_of(rows)
    names = ("recovered", "pruned", control or "")
    recovered, pruned, dense = (perplexity(rows, name) for name in names)
    if recovered is None or pruned is None or dense is None or pruned <= dense:
        return None
    return (math.log(pruned) - math.log(recovered)) / (math.log(pruned) - math.log(dense))


def comparison(rows: Mapping[str, Row], method: str) -> str:
    """Say what recovery won back and how the method compares with random channels, if known."""
    sentences = []
    share = won_back(rows)
    if share is not None and share > 0:
        sentences.append(
            f"Training on after pruning won back {percent(share)} of the loss that pruning added."
        )
    pruned, chance = (perplexity(rows, name) for name in ("pruned", "random"))
    if pruned is not None and chance is not None:
        better = "better than" if pruned < chance else "no better than"
        sentences.append(
            f"Before recovery, channels chosen by {method} are {better} as many chosen at "
            f"random: {short(pruned)} against {short(chance)}."
        )
    return " ".join(sentences)


def _saving(rows: Mapping[str, Row]) -> str:
    before, after = number(rows, "dense", "state_bytes"), _pruned_state(rows)
    if before is None or after is None or before <= 0:
        return "Pruning was run"
    if after == before:
        return f"Pruning left the recurrent state at {bytes_text(before)} a sequence"
    return (
        f"Pruning took {percent(1 - after / before)} off the recurrent state "
        f"({bytes_text(before)} to {bytes_text(after)} a sequence)"
    )


def control_of(rows: Mapping[str, Row]) -> str | None:
    """Return the name of the dense model to compare with: trained on, if measured, or dense."""
    names = ("dense_continued", "dense")
    return next((name for name in names if perplexity(rows, name) is not None), None)


def described(control: str | None) -> str:
    if control == "dense_continued":
        return "the dense model trained on for as many tokens"
    return "the dense model"


def _pruned_state(rows: Mapping[str, Row]) -> float | None:
    found = (number(rows, name, "state_bytes") for name in ("recovered", "pruned"))
    return next((value for value in found if value is not None), None)


def perplexity(rows: Mapping[str, Row], name: str) -> float | None:
    return number(rows, name, "perplexity")


def number(rows: Mapping[str, Row], name: str, key: str) -> float | None:
    """Return a finite number of the table, or None."""
    value = rows.get(name, {}).get(key)
    return value if value is not None and math.isfinite(value) else None


def short(value: float) -> str:
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if abs(share) >= 0.095 else f"{100 * share:.1f}%"


def change_text(before: float, after: float) -> str:
    change = after / before - 1
    if abs(change) < 0.0005:
        return "unchanged"
    return ("+" if change > 0 else "−") + percent(abs(change))


def bytes_text(count: float) -> str:
    """Return a number of bytes in the largest binary unit that it fills, e.g. `1.5 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} GiB"
