"""The schedule of a shrinking: at which steps channels go, and how many are left then.

Widths fall evenly from the model's to the target, each rounded to a multiple. The last one is the
target itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from flame.errors import UserError
from pruning.spaces import NOUNS, Kind

Widths = Mapping[Kind, int]


@dataclass(frozen=True)
class Phase:
    """Channels that go, and the training that follows."""

    number: int
    """From 1 on; names the phase's run folder."""
    start: int
    """Steps of training that are done when the phase begins."""
    end: int
    """Steps that are done when it ends."""
    widths: Widths
    """What the kinds that change keep; none where the phase trains the model as it is."""


def even_steps(prunings: int, steps: int, from_start: bool) -> tuple[int, ...]:
    """The steps at which to prune so that training is cut into equal parts.

    Args:
        prunings: how often channels go.
        steps: of the whole training.
        from_start: the first pruning comes before the first step, not after the first part.

    Raises:
        UserError: there are fewer steps than parts.
    """
    parts = prunings if from_start else prunings + 1
    if steps < parts:
        raise UserError(f"--prunings {prunings} cut {steps} steps into {parts} parts: train longer")
    first = 0 if from_start else 1
    return tuple(steps * (first + done) // parts for done in range(prunings))


def phases(
    at: Sequence[int], steps: int, sizes: Widths, target: Widths, multiples: Widths
) -> list[Phase]:
    """The phases that lead from `sizes` to `target`, in order.

    Args:
        at: steps after which channels go, in rising order; 0 is before the first step.
        steps: of the whole training.
        sizes: channels or heads of each kind now.
        target: what each kind keeps in the end; fewer than now.
        multiples: what kept widths are multiples of.

    Raises:
        UserError: the schedule does not end at the target, or has a pruning that removes nothing.
    """
    if at[-1] >= steps:
        raise UserError(
            f"the schedule does not reach its target: it prunes after step {at[-1]}, and training "
            f"ends after step {steps}, so nothing is trained then; prune earlier or train longer"
        )
    kept = [_kept(done + 1, len(at), sizes, target, multiples) for done in range(len(at))]
    found = [] if at[0] == 0 else [Phase(1, 0, at[0], {})]
    before = sizes
    for start, end, widths in zip(at, (*at[1:], steps), kept, strict=True):
        changed = {kind: width for kind, width in widths.items() if width < before[kind]}
        if not changed:
            raise UserError(_too_many(len(at), start, sizes, target, multiples))
        found.append(Phase(len(found) + 1, start, end, changed))
        before = widths
    return found


def _kept(done: int, prunings: int, sizes: Widths, target: Widths, multiples: Widths) -> Widths:
    """What each kind keeps after `done` of the prunings."""
    if done == prunings:
        return dict(target)
    found = {}
    for kind, size in sizes.items():
        exact = size - Fraction((size - target[kind]) * done, prunings)
        # Half a multiple up, so that the first steps, which cost least, are not the largest.
        rounded = int(exact / multiples[kind] + Fraction(1, 2)) * multiples[kind]
        found[kind] = min(max(rounded, target[kind]), size)
    return found


def _too_many(prunings: int, step: int, sizes: Widths, target: Widths, multiples: Widths) -> str:
    kinds = ", ".join(
        f"{sizes[kind]} to {target[kind]} {NOUNS[kind]} in multiples of {multiples[kind]}"
        for kind in sizes
    )
    return (
        f"the pruning after step {step} would remove nothing: {prunings} prunings are too many for "
        f"{kinds}; take fewer, or a smaller --multiple-of"
    )
