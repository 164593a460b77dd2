"""What the numbers of a report prove, in sentences.

A claim on quality compares two models on the same documents, one of which is the other's control:
what it was pruned from, trained on as many tokens. It gives the difference with its interval. Where
the control, the tokens or the interval is missing there is no sentence, and the numbers stand.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launch.evaluation.intervals import Difference, difference, read_losses, won_back
from launch.reporting.data import Measured, ReportData
from launch.reporting.lineage import control_of
from launch.reporting.sentences import bytes_text, change_text, percent, short


@dataclass(frozen=True)
class Claim:
    """A model's loss beside that of its control."""

    model: str
    control: str
    difference: Difference
    text: Measured


def against_control(data: ReportData, text: Measured, model: str) -> Claim | None:
    """The model's loss beside its control's on a text; None where that cannot be said."""
    control = control_of(model, data.lineages) if model in data.lineages else None
    if control is None or control not in text.records or model not in text.records:
        return None
    found = difference(*(read_losses(text.records[name]) for name in (model, control)))
    return None if found is None else Claim(model, control, found, text)


def claims(data: ReportData) -> list[Claim]:
    """All claims on quality, one a model, on the first text that has one."""
    found: dict[str, Claim] = {}
    for text in data.texts:
        for model in text.records:
            claim = against_control(data, text, model)
            if claim is not None:
                found.setdefault(model, claim)
    return list(found.values())


def leading(data: ReportData) -> Claim | None:
    """The claim that a page begins with: of a pruned model that was trained on, or of one."""
    found = {_kind(data, claim.model): claim for claim in reversed(claims(data))}
    return found.get("recovered", found.get("pruned"))


def verdict(data: ReportData) -> str:
    """The sentence at the head of a page: what pruning saved, and what it cost if that is known.

    An empty text where nothing can be said.
    """
    chosen = leading(data)
    planned = [name for name in data.states if _kind(data, name) in ("pruned", "recovered")]
    plan = data.lineages[chosen.model].plan_from if chosen else next(iter(planned), None)
    sizes = data.states.get(plan or "")
    parts = [_saving(sizes)] if sizes else []
    parts += [claim_text(data, chosen)] if chosen else []
    if parts and not chosen:
        parts.append("What it cost is not measured against a control.")
    return " ".join(parts)


def _kind(data: ReportData, model: str) -> str:
    return data.lineages[model].kind if model in data.lineages else ""


def _saving(sizes: tuple[int, int]) -> str:
    before, after = sizes
    return (
        f"Pruning takes {percent(1 - after / before)} off the recurrent state of a sequence "
        f"({bytes_text(before)} to {bytes_text(after)})."
    )


def claim_text(data: ReportData, claim: Claim) -> str:
    """The claim as a sentence, with its interval and both perplexities."""
    lineage = data.lineages[claim.model]
    control = claim.control
    when = ", not trained on,"
    if lineage.kind == "recovered":
        when = ""
        control += f", the dense model trained on for as many tokens ({lineage.tokens:,})"
    values = [
        short(claim.text.records[name]["perplexity"]) for name in (claim.model, claim.control)
    ]
    perplexities = f"perplexity {values[0]} and {values[1]}"
    found = claim.difference
    if not found.is_sure:
        return (
            f"{claim.model}{when} cannot be told apart from {control}, on {found.documents} "
            f"documents: {found.text()} nats a token, {perplexities}."
        )
    way = "more" if found.loss > 0 else "less"
    low, high = sorted((abs(found.low), abs(found.high)))
    return (
        f"{claim.model}{when} loses {abs(found.loss):.4f} nats a token {way} "
        f"(95 % interval {low:.4f} to {high:.4f}) than {control}: {perplexities}."
    )


def details(data: ReportData) -> list[str]:
    """Further sentences: the claims that are not the verdict, and what they leave open."""
    head = verdict(data)
    found = [claim_text(data, claim) for claim in claims(data)]
    found = [sentence for sentence in found if sentence not in head]
    for model in data.lineages:
        if _kind(data, model) == "recovered":
            found += [s for s in (_won_back(data, model), _divergence(data, model)) if s]
        if _kind(data, model) == "pruned":
            found += _beside_random(data, model)
    return found


def _won_back(data: ReportData, model: str) -> str | None:
    """How much of the gap to the control training on closed."""
    lineage, control = data.lineages[model], control_of(model, data.lineages)
    pruned = lineage.parent
    if control is None or pruned is None or lineage.plan_from == model:
        return None
    for text in data.texts:
        losses = [read_losses(text.records.get(name, {})) for name in (pruned, model, control)]
        share = None if None in losses else won_back(*losses)  # type: ignore[arg-type]
        if share is not None and share[0] > 0:
            middle, low, high = (f"{100 * part:.0f}" for part in share)
            return (
                f"Training on closed {middle} % (95 % interval {low} to {high}) of the gap between "
                f"{pruned} and {control}, the dense model trained on for as many tokens."
            )
    return None


def _divergence(data: ReportData, model: str) -> str | None:
    """How training on moved a pruned model's predictions from those of the dense one."""
    pruned = data.lineages[model].parent
    before, after = (data.fidelity.get(name or "", {}) for name in (pruned, model))
    if not before or before.get("against") != after.get("against"):
        return None
    found = difference(read_losses(after), read_losses(before))
    if found is None or not found.is_sure:
        return None
    way = "away from" if found.loss > 0 else "towards"
    return (
        f"Training on moved the predictions {way} those of the dense model: KL {before['kl']:.4f} "
        f"nats a token of {pruned}, {after['kl']:.4f} of {model} ({found.text()})."
    )


def _beside_random(data: ReportData, model: str) -> Iterator[str]:
    """Yield how a method's choice compares with as many channels drawn at random."""
    own, plans = data.lineages[model], data.plans
    for other, its in data.lineages.items():
        same_size = data.states.get(other) == data.states.get(model)
        if (its.kind, its.parent) != ("random", own.parent) or not same_size or not own.parent:
            continue
        for text in data.texts:
            losses = [read_losses(text.records.get(name, {})) for name in (model, other)]
            found = difference(*losses)
            if found is not None:
                method = plans.get(model, {}).get("method", "the method")
                way = "less" if found.loss < 0 else "more"
                low, high = sorted((abs(found.low), abs(found.high)))
                sure = f"loses {abs(found.loss):.4f} nats a token {way} ({low:.4f} to {high:.4f})"
                yield (
                    f"Not trained on, {model} (channels chosen by {method}) "
                    + (f"{sure} than " if found.is_sure else "cannot be told apart from ")
                    + f"{other}, one draw of as many at random."
                )
                break


def changes(data: ReportData) -> Iterator[tuple[str, str, str]]:
    """Yield heading, change and both values, from the control to the model of the verdict."""
    chosen = leading(data)
    if chosen is None:
        return
    pair = (chosen.control, chosen.model)
    perplexities = [chosen.text.records[name]["perplexity"] for name in pair]
    yield _change("Held-out perplexity", perplexities, short)
    named: list[tuple[str, str, Any]] = [
        ("Recurrent state a sequence", "state_bytes", bytes_text),
        *((heading, heading, _count) for heading in data.speeds[:1]),
        ("Parameters", "parameters", _count),
    ]
    for heading, key, write in named:
        values = [data.rows.get(name, {}).get(key) for name in pair]
        if all(values):
            yield _change(heading[0].upper() + heading[1:], values, write)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _change(heading: str, values: list[Any], write: Callable[[Any], str]) -> tuple[str, str, str]:
    return heading, change_text(*values), " → ".join(map(write, values))
