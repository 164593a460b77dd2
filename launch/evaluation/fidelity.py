"""How closely a model follows another one, usually the dense model it was pruned from.

On held-out text, for every token that both predict: the Kullback-Leibler divergence of the model's
distribution from the reference's, and whether both put the same token first.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flame.checkpoint.reference import vocabulary_size
from flame.errors import UserError
from flame.models.gpu_limits import float32_advice

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flame.checkpoint.reference import ModelReference
    from launch.evaluation.heldout_text import HeldoutText

POSITIONS = 512
"""Tokens whose distributions are compared at once: bounds the fp32 copies of the logits."""


@dataclass(frozen=True)
class Fidelity:
    """The distance of a model from a reference on a text."""

    kl: float
    """KL(reference ‖ model), nats, mean over predicted tokens."""

    agreement: float
    """Share of predicted tokens for which both models have the same most likely token."""

    tokens: int
    against: str
    data: str
    seq_len: int
    dtype: str

    def record(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)


def check_comparable(model: "ModelReference", against: "ModelReference") -> None:
    """Refuse two models whose predictions are not about the same tokens."""

    sizes = [vocabulary_size(reference.config) for reference in (model, against)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{model.weights} has a vocabulary of {sizes[0]} and {against.weights} one of "
            f"{sizes[1]}: KL needs models over the same tokens"
        )


def measure_fidelity(
    model: "nn.Module",
    against: "nn.Module",
    reference: "ModelReference",
    dense: "ModelReference",
    text: "HeldoutText",
    dtype: str,
) -> Fidelity:
    """Compare `model` with `against`, both loaded from their references. Collective.

    Args:
        text: read with the tokenizer of `model`.
        dtype: of the forward passes, for the record.

    Raises:
        UserError: the text cannot be used, or a model's logits are not finite.
    """
    from flame.hugging_face.config_file import keeps_documents_apart

    apart = all(keeps_documents_apart(each.config) for each in (reference, dense))
    rows = text.sequences(vocabulary_size(reference.config), apart)
    kl, agreeing, tokens = sum_divergences(model, against, rows)
    if tokens == 0:
        raise UserError("the held-out text has no token to predict: give longer documents")
    if not math.isfinite(kl):
        raise UserError(
            f"{reference.weights} or {dense.weights} gives logits that are not finite: "
            f"{float32_advice(reference.config)}"
        )
    return Fidelity(
        kl=kl / tokens,
        agreement=agreeing / tokens,
        tokens=tokens,
        against=str(dense.weights),
        data=text.name,
        seq_len=text.seq_len,
        dtype=dtype,
    )


def sum_divergences(
    model: "nn.Module", against: "nn.Module", rows: Iterable[Any]
) -> tuple[float, int, int]:
    """KL in nats, agreements and tokens, each summed over the rows of all ranks. Collective."""
    import torch
    import torch.distributed as dist

    from flame.process.dealing import turns
    from flame.process.progress import progress

    sums = torch.zeros(3, dtype=torch.float64)
    for turn in progress(turns(rows), "compare"):
        inputs, labels, *_ = turn.item
        compared = _row_divergence(model, against, inputs, labels)
        if turn.counts:
            sums += torch.tensor(compared, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    kl, agreeing, tokens = sums.tolist()
    return kl, int(agreeing), int(tokens)


def _row_divergence(
    model: "nn.Module", against: "nn.Module", inputs: dict[str, "Tensor"], labels: "Tensor"
) -> tuple[float, int, int]:
    import torch

    from flame.process.distributed import local_device

    moved = {name: value.to(local_device()) for name, value in inputs.items()}
    tokens = moved.pop("input")
    predicted = (labels.flatten() != -100).nonzero().flatten().to(local_device())
    with torch.no_grad():
        logits = [
            network(input_ids=tokens, use_cache=False, **moved).logits.flatten(0, 1)
            for network in (model, against)
        ]
        parts = [divergence(*(each[chunk] for each in logits)) for chunk in _chunks(predicted)]
    kl = math.fsum(part[0] for part in parts)
    return kl, sum(part[1] for part in parts), len(predicted)


def divergence(logits: "Tensor", reference: "Tensor") -> tuple[float, int]:
    """KL of softmax(`logits`) from softmax(`reference`), nats, and agreements; sums over [N, V]."""
    ours, theirs = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).double().sum()
    return float(kl), int((ours.argmax(-1) == theirs.argmax(-1)).sum())


def _chunks(positions: "Tensor") -> tuple["Tensor", ...]:
    return positions.split(POSITIONS) if len(positions) else ()
