"""`--gain measured`: what pruned models predict decides about their gain, and about their repair.

A gain that is undone gives what zeros in the dropped channels would, layer by layer, and a repair
what the dense layer gave, as far as least squares over all tokens can. Neither says which model
predicts more like the dense one: where few tokens matter, such as the answers of recall, larger
outputs may do better than faithful ones (docs/results.md has a model for either). So both are
measured on held-out text of the calibration; where two agree in three digits, the gain is undone
and the repair left out.

Notes of the plan hold the KLs with two digits, which do not depend on the number of processes.
"""

import time
from dataclasses import replace

from flame.checkpoint.reference import ModelReference
from flame.process.distributed import rank
from pruning.calibration.data import CalibrationData
from pruning.damage.meter import Damage, DamageMeter, least
from pruning.planning.gain import with_gain
from pruning.planning.plan import Plan

_KL = "nats a token from the dense model"


def with_measured_gain(
    reference: ModelReference, plan: Plan, data: CalibrationData, count: int
) -> tuple[Plan, Damage]:
    """`plan` with its gain undone or kept, by which is closer to the dense model, and how close.

    Prints what was found. Collective; every rank gets the same.

    Args:
        reference: the dense model.
        plan: the same on every rank, with the gain undone where its family can.
        data: what the calibration read; the `count` rows after it are measured on.
    """
    began, kept = time.perf_counter(), with_gain(plan)
    plans = [plan] if kept is None else [plan, kept]
    damages = DamageMeter(reference, data, count).damages_of(plans)
    best = least(damages)
    taken, found = plans[best], damages[best]
    if kept is None:
        return taken, found
    name, other = (("undone", "kept"), ("kept", "undone"))[best]
    left = damages[1 - best].kl
    what = f"--gain measured: {name}"
    _say(f"{what}: {found.kl:.3g} {_KL} on {count} held-out sequences, {other} {left:.3g}", began)
    note = f"{what}: {found.kl:.2g} {_KL} on held-out text, {other} {left:.2g}"
    return replace(taken, notes=(*taken.notes, note)), found


def with_measured_repair(
    reference: ModelReference,
    plan: Plan,
    damage: Damage,
    repaired: Plan,
    data: CalibrationData,
    count: int,
) -> Plan:
    """`repaired`, or `plan` if that is as close to the dense model. Prints which. Collective.

    Args:
        reference: the dense model.
        plan: the same on every rank.
        damage: of `plan`, on the same rows.
        repaired: `plan` with a repair, the same on every rank.
        data, count: as in `with_measured_gain`.
    """
    began = time.perf_counter()
    [found] = DamageMeter(reference, data, count).damages_of([repaired])
    helps = least([damage, found]) == 1
    what = f"--repair output is {'taken' if helps else 'left out'}"
    without = damage.kl
    _say(
        f"{what}: {found.kl:.3g} {_KL} on {count} held-out sequences, without {without:.3g}", began
    )
    note = f"{what}: {found.kl:.2g} {_KL} on held-out text, without {without:.2g}"
    taken = repaired if helps else plan
    return replace(taken, notes=(*taken.notes, note))


def _say(text: str, began: float) -> None:
    if rank() == 0:
        print(f"{text}; measured in {time.perf_counter() - began:.0f} s", flush=True)
