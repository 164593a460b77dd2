"""How closely a model follows another one, usually the dense model it was pruned from.

On held-out text, for every token that both predict: the Kullback-Leibler divergence of the model's
distribution from the reference's, and whether both put the same token first.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flame.errors import UserError
from flame.hugging_face.config_file import vocabulary_size
from flame.models.gpu_limits import float32_advice
from launch.evaluation.document_sums import DocumentSums
from launch.evaluation.intervals import DocumentLosses

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flame.checkpoint.reference import ModelReference
    from flame.data.heldout import Heldout
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
    documents: DocumentLosses
    """KL by document, from which differences between models get their intervals."""

    against: str
    data: str
    seq_len: int
    dtype: str

    def record(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**dataclasses.asdict(self), "documents": self.documents.record()}


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
    kl, agreeing, tokens, documents = sum_divergences(model, against, rows)
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
        documents=documents,
        against=str(dense.weights),
        data=text.name,
        seq_len=text.seq_len,
        dtype=dtype,
    )


def sum_divergences(
    model: "nn.Module", against: "nn.Module", rows: "Iterable[Heldout]"
) -> tuple[float, int, int, DocumentLosses]:
    """KL in nats, agreements and tokens, summed over the rows of all ranks; KL by document.

    Collective.
    """
    import torch
    import torch.distributed as dist

    from flame.process.dealing import turns
    from flame.process.progress import progress

    agreements, sums = torch.zeros(1, dtype=torch.int64), DocumentSums()
    for turn in progress(turns(rows), "compare"):
        predicted, kl, agreeing = _row_divergence(
            model, against, turn.item.inputs, turn.item.labels
        )
        if turn.counts:
            sums.add(turn.item.documents[predicted], kl, torch.ones_like(kl))
            agreements += agreeing
    if dist.is_initialized():
        dist.all_reduce(agreements)
    kl_sum, tokens, documents = sums.reduced()
    return kl_sum, int(agreements), tokens, documents


def _row_divergence(
    model: "nn.Module", against: "nn.Module", inputs: "Mapping[str, Tensor]", labels: "Tensor"
) -> tuple["Tensor", "Tensor", int]:
    """Places of the n predicted tokens in a row, their KL float64 [n] on the CPU, agreements."""
    import torch

    from flame.process.distributed import local_device

    moved = {name: value.to(local_device()) for name, value in inputs.items()}
    tokens = moved.pop("input")
    predicted = (labels.flatten() != -100).nonzero().flatten()
    with torch.no_grad():
        logits = [
            network(input_ids=tokens, use_cache=False, **moved).logits.flatten(0, 1)
            for network in (model, against)
        ]
        chunks = _chunks(predicted.to(local_device()))
        parts = [divergence(*(each[chunk] for each in logits)) for chunk in chunks]
    kl = [part[0].cpu() for part in parts] or [torch.zeros(0, dtype=torch.float64)]
    return predicted, torch.cat(kl), sum(part[1] for part in parts)


def divergence(logits: "Tensor", reference: "Tensor") -> tuple["Tensor", int]:
    """KL of softmax(`logits`) from softmax(`reference`) [N, V], nats, float64 [N]; agreements."""
    ours, theirs = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).double()
    return kl, int((ours.argmax(-1) == theirs.argmax(-1)).sum())


def _chunks(positions: "Tensor") -> tuple["Tensor", ...]:
    return positions.split(POSITIONS) if len(positions) else ()
