"""Where the models of a report come from: which was pruned from which, and trained on for how long.

Told by fingerprints: a plan records that of the model it was made for, a LoRA run that of its base.
A run that trains all weights records only the path that it started from, which counts if it lies
in a run of the report of the same configuration. Names of folders tell nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from flame.errors import UserError
from launch.drawing.figure import SERIES
from launch.reporting.run_folders import RunFolder

Kind = Literal["dense", "dense_continued", "pruned", "random", "recovered", ""]
"""`recovered` is a pruned model that was trained on; empty is a model of which nothing is known."""


@dataclass(frozen=True)
class Lineage:
    """How one model came about."""

    kind: Kind = ""
    parent: str | None = None
    """The run that it was pruned from, or that its training started from."""

    plan_from: str | None = None
    """The run whose plan it was pruned by: itself, or its parent."""

    steps: int | None = None
    """Training steps since `parent`; None where they are not known."""

    tokens: int | None = None
    """Tokens of these steps."""

    text: str = ""
    """The same for a reader."""


@dataclass(frozen=True)
class _Owner:
    """A run and the step of it that has some fingerprint."""

    name: str
    step: int


def lineages(runs: Mapping[str, RunFolder]) -> dict[str, Lineage]:
    """Where each run comes from, by name; reads samples of weights to find their fingerprints."""
    wanted = {run.made_from for run in runs.values() if run.made_from}
    owners = _owners(runs, wanted)
    found: dict[str, Lineage] = {}
    # A run that was trained from another comes after it, as its kind follows from the other's.
    for name in sorted(runs, key=lambda name: runs[name].plan is None):
        found[name] = _lineage(name, runs, owners, found)
    return {name: found[name] for name in runs}


def _lineage(
    name: str,
    runs: Mapping[str, RunFolder],
    owners: Mapping[str, _Owner],
    found: Mapping[str, Lineage],
) -> Lineage:
    run = runs[name]
    owner = owners.get(run.made_from or "") or _by_path(run, runs)
    if run.plan is not None:
        return _pruned(name, run, owner)
    if owner is None:
        is_source = any(other.name == name for other in owners.values())
        kind: Kind = "dense" if is_source else ""
        start = "trained from a model that is not here" if run.start else ""
        return Lineage(kind, text=start or _trained("trained", run.step))
    before = found.get(owner.name, Lineage())
    parent = runs[owner.name]
    kind = "dense_continued" if parent.plan is None and before.kind in ("", "dense") else ""
    if before.kind in ("pruned", "recovered"):
        kind = "recovered"
    tokens = run.tokens_of(run.step)
    text = _trained(f"trained on from {owner.name}", run.step, tokens) + _way(run)
    return Lineage(kind, owner.name, before.plan_from, run.step, tokens, text)


def _pruned(name: str, run: RunFolder, owner: _Owner | None) -> Lineage:
    """The lineage of a run that was pruned here, and perhaps trained on in the same folder."""
    assert run.plan is not None
    method = str(run.plan.get("method", {}).get("name", "?"))
    source = owner.name if owner else None
    text = f"pruned by {method} from {source or 'a model that is not here'}"
    if not run.has_losses or run.step is None:
        kind: Kind = "random" if method == "random" else "pruned"
        return Lineage(kind, source, name, 0, 0, text)
    steps = run.step - owner.step if owner else None
    tokens = None if steps is None else run.tokens_of(steps)
    kind = "recovered" if steps and method != "random" else ""
    return Lineage(
        kind, source, name, steps, tokens, _trained(f"{text}, trained on", steps, tokens)
    )


def _trained(what: str, steps: int | None, tokens: int | None = None) -> str:
    if steps is None:
        return what if what != "trained" else ""
    counted = "" if tokens is None else f" ({tokens:,} tokens)"
    return f"{what} for {steps:,} step{'s' if steps != 1 else ''}{counted}"


def _way(run: RunFolder) -> str:
    """How a run trained, as far as that makes it unlike another of as many tokens."""
    lora, distill = (run.recipe.get(name) for name in ("lora", "distill"))
    rank = lora.get("rank") if isinstance(lora, dict) else 0
    teacher = distill.get("teacher") if isinstance(distill, dict) else ""
    return (f", LoRA of rank {rank}" if rank else "") + (", with a teacher" if teacher else "")


def control_of(name: str, found: Mapping[str, Lineage]) -> str | None:
    """The model that `name` is fairly compared with: what it was pruned from, trained as long.

    None if the report does not have it, or the tokens that either was trained on are not known.
    """
    lineage = found[name]
    if lineage.kind in ("pruned", "random"):
        return lineage.parent
    if lineage.kind != "recovered" or not lineage.tokens:
        return None
    own_plan = lineage.plan_from == name
    source = lineage.parent if own_plan else found[lineage.parent or ""].parent
    if source is None:
        return None
    return next(
        (
            other
            for other, its in found.items()
            if (its.kind, its.parent, its.tokens) == ("dense_continued", source, lineage.tokens)
        ),
        None,
    )


def _owners(runs: Mapping[str, RunFolder], wanted: set[str]) -> dict[str, _Owner]:
    """The runs that have the `wanted` fingerprints; last steps are looked at first."""
    owners: dict[str, _Owner] = {}
    steps: dict[str, list[int | None]] = {
        name: [*reversed(run.steps)] or [None] for name, run in runs.items()
    }
    for depth in range(max(map(len, steps.values()), default=0)):
        for name, run in runs.items():
            if depth < len(steps[name]) and wanted - set(owners):
                step = steps[name][depth]
                mark = _fingerprint(run, step)
                if mark in wanted:
                    owners.setdefault(mark, _Owner(name, step or 0))
    return owners


def run_of_record(runs: Mapping[str, RunFolder], record: Mapping[str, Any]) -> str | None:
    """Return whose an evaluation is: by the weights' path or, if that is gone, fingerprint."""
    weights = record.get("weights") or record["model"]
    name = run_of(runs, weights)
    if name is None and not Path(str(weights)).exists():
        mark = record.get("fingerprint")
        name = next((run for run in runs if mark and mark == last_mark(runs[run])), None)
    return name


def run_of(runs: Mapping[str, RunFolder], reference: Any) -> str | None:
    """Return the run that a path leads into; another step than its last has a name of its own.

    None for the path of a model that is no run here.
    """
    if not isinstance(reference, str):
        return None
    path = Path(reference).resolve()
    for name, run in runs.items():
        if path.is_relative_to(run.folder):
            step = path.name if path.name.startswith("step-") else ""
            return name if step in ("", f"step-{run.step}") else f"{name}/{step}"
    return None


def last_mark(run: RunFolder) -> str:
    """The fingerprint of a run's last step; an empty text if it cannot be read."""
    return _fingerprint(run, run.step)


def _fingerprint(run: RunFolder, step: int | None) -> str:
    """The fingerprint of a run's step; an empty text if it cannot be read."""
    from flame.checkpoint.fingerprint import fingerprint
    from flame.checkpoint.reference import resolve

    try:
        reference = resolve(run.folder, step)
        return fingerprint(reference.config, reference.source())
    except UserError:
        return ""


def _by_path(run: RunFolder, runs: Mapping[str, RunFolder]) -> _Owner | None:
    """The run that a training of all weights started from, by its path and configuration."""
    if run.made_from or run.start is None:
        return None
    for name, other in runs.items():
        inside = Path(run.start).resolve().is_relative_to(other.folder)
        if inside and other is not run and other.config == run.config:
            return _Owner(name, other.step or 0)
    return None


def colours(found: Mapping[str, Lineage], names: Iterable[str]) -> dict[str, str]:
    """The role of each model's colour: its kind's or, if another has that, one of its own."""
    first: dict[str, str] = {}
    for name, its in found.items():
        first.setdefault(its.kind, name)
    others = cycle([role for role in SERIES if role not in first])
    return {
        name: found[name].kind
        if name in found and found[name].kind and first[found[name].kind] == name
        else next(others)
        for name in dict.fromkeys([*found, *names])
    }
