"""The meter: how far other models are from the dense one, on rows that follow a calibration's.

The others are the dense one with zeros, or what plans make of it. All are sharded as in a
calibration. Each row runs once in each model; what is found of a row does not depend on who ran it,
and rows are added in their order, so that every world size finds the same.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flame.checkpoint.load import build_sharded
from flame.checkpoint.reference import ModelReference
from flame.data.packing import IGNORE_INDEX
from flame.errors import UserError
from flame.process.distributed import (
    compute_dtype,
    data_parallel_mesh,
    gather_objects,
    local_device,
    rank,
    world_size,
)
from flame.process.peers import Peers
from flame.process.progress import progress
from pruning.adapters import adapter_for
from pruning.calibration.data import CalibrationData
from pruning.calibration.stats_file import read_meta
from pruning.damage.applied import pruned_model
from pruning.damage.masking import masked
from pruning.planning.plan import Plan
from pruning.spaces import Kept

DIGITS = 3
"""Of a KL, by which models are compared."""

POSITIONS = 512
"""Tokens whose distributions are compared at once: bounds the fp32 copies of the logits."""

Row = tuple[dict[str, Tensor], Tensor]
"""Inputs and labels, as the loader gives them."""


Other = Callable[[], AbstractContextManager[nn.Module]]
"""Gives a model that is compared with the dense one, for the time of a row."""


@dataclass(frozen=True)
class Damage:
    """How far a model is from the dense one, in nats a predicted token."""

    kl: float
    """KL(dense ‖ model)."""
    loss: float
    """The rise of the cross entropy, which on little text may be negative by chance."""


def least(damages: Sequence[Damage]) -> int:
    """The number of the model with the least KL, the earlier one of those that agree."""
    rounded = [float(f"{found.kl:.{DIGITS - 1}e}") for found in damages]
    return rounded.index(min(rounded))


class DamageMeter:
    """Compares models with a dense one on `count` rows after those of a calibration.

    Making and using one is collective.

    Raises:
        UserError: on every rank, if the text ends before.
    """

    def __init__(self, reference: ModelReference, data: CalibrationData, count: int) -> None:
        self.peers, self.reference = Peers(), reference
        self.spaces = adapter_for(reference.config).spaces(reference.config)
        self.rows = self.peers.agree(lambda: _own_rows(data, count))
        self.rounds = max(gather_objects(len(self.rows)))
        self.model = build_sharded(reference, data_parallel_mesh(), compute_dtype())

    def damages(self, selections: Sequence[Mapping[str, Kept]]) -> list[Damage]:
        """The damage of each selection; spaces that it lacks stay whole. Collective.

        Raises:
            UserError: on every rank, if a prediction is not finite.
        """
        return self._found([partial(self._masked, kept) for kept in selections])

    def damages_of(self, plans: Sequence[Plan]) -> list[Damage]:
        """The damage of what each plan writes. Collective.

        All of them are in memory beside the dense model, in fp32, sharded like it.

        Args:
            plans: the same on every rank, with new tensors that are in memory.

        Raises:
            UserError: on every rank, if a tensor or a prediction is not finite.
        """
        mesh, dtype = data_parallel_mesh(), compute_dtype()
        models = [pruned_model(self.reference, plan, mesh, dtype) for plan in plans]
        return self._found([partial(nullcontext, model) for model in models])

    @contextmanager
    def _masked(self, kept: Mapping[str, Kept]) -> Iterator[nn.Module]:
        with masked(self.model, self.spaces, kept):
            yield self.model

    def _found(self, others: Sequence[Other]) -> list[Damage]:
        numbers = list(self.rows)
        found: dict[int, list[tuple[float, float, int]]] = {}
        for turn in progress(range(self.rounds), "measure damage", self.rounds):
            counts = turn < len(numbers)
            of_row = list(self._row(self.rows[numbers[turn]] if counts else _NOTHING, others))
            if counts:
                found[numbers[turn]] = of_row
        rows = {number: row for part in gather_objects(found) for number, row in part.items()}
        return [_mean([rows[number][i] for number in sorted(rows)]) for i in range(len(others))]

    @torch.no_grad()
    def _row(self, row: Row, others: Sequence[Other]) -> Iterator[tuple[float, float, int]]:
        """Yield KL, rise of the loss and number of predicted tokens, summed, of each model."""
        inputs, labels = row
        targets = labels.flatten().to(local_device())
        predicted = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
        dense, targets = _logits(self.model, inputs, predicted), targets[predicted]
        for give in others:
            with give() as model:
                other = _logits(model, inputs, predicted)
            parts = zip(*(x.split(POSITIONS) for x in (dense, other, targets)), strict=True)
            sums = torch.zeros(2, dtype=torch.float64)
            for part in parts:
                sums += _compared(*part).cpu()
            yield float(sums[0]), float(sums[1]), len(predicted)


def _logits(model: nn.Module, inputs: Mapping[str, Tensor], predicted: Tensor) -> Tensor:
    given: dict[str, Any] = {name: value.to(local_device()) for name, value in inputs.items()}
    tokens = given.pop("input")
    logits: Tensor = model(input_ids=tokens, use_cache=False, **given).logits
    return logits.flatten(0, 1)[predicted]


_NOTHING: Row = (
    {"input": torch.zeros((1, 1), dtype=torch.int64)},
    torch.zeros((1, 1), dtype=torch.int64),
)
"""What a rank without a row runs, since FSDP2's gathers need every rank."""


def measured_data(data: CalibrationData, count: int, why: str) -> CalibrationData:
    """`data` with the `count` rows that are measured on, to ask whether there is enough text.

    Args:
        why: the option that measures, for messages.
    """
    asked = data.asked or f"{data.sequences} sequences of {data.seq_len} tokens"
    return replace(
        data,
        sequences=data.sequences + count,
        asked=f"{asked}, and {count} held-out ones after them for {why}",
    )


def check_measurement(stats: Path | None, data: CalibrationData) -> None:
    """Raise UserError if rows after those of `data` may be among those that `stats` are sums of."""
    if stats is None:
        return
    meta = read_meta(stats)
    here = {
        "data": data.record(),
        "seed": data.config.seed,
        "seq_len": data.seq_len,
        "sequences": data.sequences,
    }
    for name, value in here.items():
        if getattr(meta, name) != value:
            raise UserError(
                f"--allocate auto measures on what follows the calibration's text, and {stats} was "
                f"made with {name} {getattr(meta, name)}, not {value}: give the same options"
            )


def _own_rows(data: CalibrationData, count: int) -> dict[int, Row]:
    """This process's rows, by their number in the calibration's stream."""
    loader = data.loader(rank(), world_size())
    try:
        end = data.sequences + count
        mine = range(rank(), end, world_size())
        rows = list(islice(loader, len(mine)))
        if len(rows) < len(mine):
            raise UserError(measured_data(data, count, "measuring").too_short())
        numbered = zip(mine, rows, strict=True)
        return {number: row for number, row in numbered if number >= data.sequences}
    finally:
        loader.close()


def _compared(dense: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """KL(dense ‖ other) and the rise of the loss over some tokens, summed in float64."""
    ours, theirs = other.float().log_softmax(-1), dense.float().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    rise = (theirs - ours).gather(-1, targets[:, None]).squeeze(-1)
    return torch.stack([kl.double().sum(), rise.double().sum()])


def _mean(rows: Sequence[tuple[float, float, int]]) -> Damage:
    kl, loss, tokens = (math.fsum(column) for column in zip(*rows, strict=True))
    if not math.isfinite(kl):
        raise UserError(
            "a pruned model's predictions are not finite: check the model's weights and the "
            "precision that calibration runs in"
        )
    # Text without a token to predict says nothing: no damage.
    return Damage(kl / max(tokens, 1), loss / max(tokens, 1))
