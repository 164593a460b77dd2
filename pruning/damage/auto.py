"""`--allocate auto`: how heads share channels is chosen by what it does to the model's predictions.

Scores say which channels of a head matter, but not how the rest of the model takes an error of one
layer or another. So each space is pruned alone, to the uniform width, and what this does to the
predictions is measured: that gives all scores one unit. The shares that follow, those of the other
ways of sharing, and the uniform widths are then measured as whole masked models, and the best stay:
the earlier one where two agree in three digits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flame.checkpoint.reference import ModelReference
from flame.process.distributed import from_rank_zero, rank
from flame.process.peers import on_first
from pruning.calibration.data import CalibrationData
from pruning.damage.meter import Damage, DamageMeter, least
from pruning.planning.budgets import Budget
from pruning.planning.plan import Plan

Choose = Callable[[Budget, dict[str, float] | None], Plan]
"""Makes a plan within a budget of `layer`, `model` or `uniform`, from damages of single spaces for
scores of one unit if they are given."""


@dataclass(frozen=True)
class Candidate:
    """One way of sharing channels."""

    name: str
    plan: Plan


def auto_plan(
    reference: ModelReference, data: CalibrationData, count: int, budget: Budget, choose: Choose
) -> Plan:
    """The plan with the least damage on rank 0, and a meaningless value on others. Collective.

    Prints what each candidate does, or which earlier one keeps the same channels. The plan has
    their order and no number, since those are sums over tokens whose last digits depend on the
    machine.

    Args:
        reference: the model.
        data: what the calibration read; the `count` rows after it are measured on.
        budget: asks for `auto`.
        choose: called on rank 0.
    """
    simple = from_rank_zero(on_first(lambda: _simple(budget, choose)))
    meter = DamageMeter(reference, data, count)
    uniform = simple[0].plan
    alone = meter.damages([{name: kept} for name, kept in uniform.kept.items()])
    damage = {name: found.kl for name, found in zip(uniform.kept, alone, strict=True)}
    last = on_first(lambda: _candidate("measured", budget, choose, "model", damage))
    candidates, same = _distinct([*simple, from_rank_zero(last)])
    damages = meter.damages([each.plan.kept for each in candidates])
    best = least(damages)
    if rank() == 0:
        for each, found in zip(candidates, damages, strict=True):
            mark = ", taken" if each is candidates[best] else ""
            print(
                f"--allocate auto: {each.name}: KL {found.kl:.3g}, loss {found.loss:+.3g} nats a "
                f"token on {count} held-out sequences{mark}",
                flush=True,
            )
        for name, other in same.items():
            print(f"--allocate auto: {name}: the same channels as {other}", flush=True)
    return _recorded(candidates, damages, best, budget)


def _simple(budget: Budget, choose: Choose) -> list[Candidate]:
    """The candidates that need no measurement, the uniform one first."""
    allocations = ["uniform", "layer", "model"]
    if set(budget.kinds) != {"key"}:
        # Other kinds have one selection a layer, so its heads have nothing to share.
        allocations.remove("layer")
    return [_candidate(name, budget, choose, name, None) for name in allocations]


def _candidate(
    name: str, budget: Budget, choose: Choose, allocate: str, damage: dict[str, float] | None
) -> Candidate:
    own = replace(budget, allocate=allocate)  # type: ignore[arg-type]
    if allocate == "uniform":
        own = replace(own, pad=False, floor=None)
    return Candidate(name, choose(own, damage))


def _distinct(candidates: Sequence[Candidate]) -> tuple[list[Candidate], dict[str, str]]:
    """The first of the candidates that keep the same channels, and which of them the others are."""
    seen: dict[str, Candidate] = {}
    same: dict[str, str] = {}
    for each in candidates:
        kept = {name: [row.tolist() for row in rows] for name, rows in each.plan.kept.items()}
        first = seen.setdefault(repr(kept), each)
        if first is not each:
            same[each.name] = first.name
    return list(seen.values()), same


def _recorded(
    candidates: Sequence[Candidate], damages: Sequence[Damage], best: int, budget: Budget
) -> Plan:
    plan = candidates[best].plan
    others = (
        ", ".join(each.name for each in candidates if each is not candidates[best]) or "nothing"
    )
    form = ""
    if plan.pad:
        form = "; filled up with zeros, its state is as large as that of its widest head everywhere"
    elif plan.config_after["model_type"] != plan.config_before["model_type"]:
        form = (
            "; its widths differ, so it loads after `import flame.register`: --pad makes a stock "
            "model of them, and --allocate uniform one without zeros"
        )
    note = (
        f"--allocate auto took {candidates[best].name} over {others}, by the divergence of the "
        f"masked models from the dense one on held-out calibration text{form}"
    )
    return replace(plan, budget=budget.record(), notes=(*plan.notes, note))
