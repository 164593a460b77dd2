"""Held-out perplexity of a model, its weights sharded and the text dealt out over processes.

Weights are sharded by FSDP2; sums are kept in float64, so the figure depends on the number of
processes only to rounding.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.errors import UserError
from flame.hugging_face.config_file import keeps_documents_apart, vocabulary_size
from flame.models.gpu_limits import float32_advice
from flame.versions import versions
from launch.evaluation.document_sums import DocumentSums
from launch.evaluation.heldout_text import (
    HeldoutOptions,
    HeldoutText,
    heldout_text,
)
from launch.evaluation.intervals import DocumentLosses, standard_error
from pruning.adapters import state_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from flame.checkpoint.reference import ModelReference
    from flame.data.heldout import Heldout


Watch = Callable[["Heldout", "Tensor"], None]
"""What sees the logits of each row that a perplexity is measured on."""


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a text, and what it was measured with."""

    perplexity: float
    """e to the mean negative log-likelihood of a predicted token."""

    bits_per_byte: float
    """Negative log2-likelihood over the UTF-8 bytes that the predicted tokens stand for."""

    tokens: int
    """Predicted tokens."""

    bytes: int
    """UTF-8 bytes that they stand for."""

    sequences: int
    parameters: int
    state_bytes: int | None
    """Bytes of the recurrent state of one sequence, fp32; None where the family has no adapter."""

    model: str
    data: str
    seq_len: int
    """Tokens a row; the context starts afresh with each row and, in fla's models, each document."""

    dtype: str
    """Dtype of the forward pass; weights are stored and losses summed in fp32 and fp64."""

    apart: bool
    """Whether packed documents were kept apart; otherwise a row was read as one text."""

    error: float | None
    """Standard error of `perplexity`, from the spread over documents; None with too few."""

    documents: DocumentLosses
    """Losses by document, from which differences between models get their intervals."""

    world_size: int
    versions: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**dataclasses.asdict(self), "documents": self.documents.record()}


@dataclass(frozen=True)
class Sums:
    """What a pass over held-out text adds up."""

    loss: float
    """Negative log-likelihood of all predicted tokens, nats."""

    tokens: int
    bytes: int
    sequences: int
    documents: DocumentLosses
    """`loss` and `tokens` by document."""


def evaluate_perplexity(
    model: "str | Path | ModelReference",
    text: HeldoutOptions | None = None,
    dtype: str = "auto",
) -> Perplexity:
    """Perplexity of a model reference. Collective over the running process group.

    Args:
        model: what `flame.checkpoint.reference.resolve` takes, or gave.
        text: the held-out text; by default that of the model's recipe.
        dtype: of the forward pass: `float32`, `bfloat16`, or `auto` (bfloat16 on CUDA).

    Raises:
        UserError: the model, its tokenizer or the text cannot be used, or losses are not finite.
    """
    from flame.checkpoint.load import build_sharded
    from flame.checkpoint.reference import ModelReference, resolve
    from flame.process.distributed import compute_dtype, data_parallel_mesh

    reference = model if isinstance(model, ModelReference) else resolve(model)
    chosen = heldout_text(reference, text or HeldoutOptions())
    computed_in = compute_dtype(dtype)
    network = build_sharded(reference, data_parallel_mesh(), computed_in)
    name = str(model.weights if isinstance(model, ModelReference) else model)
    return measure_perplexity(network, reference, chosen, computed_in, name)


def measure_perplexity(
    network: "nn.Module",
    reference: "ModelReference",
    text: HeldoutText,
    dtype: "torch.dtype",
    name: str,
    apart: bool | None = None,
    watch: Watch | None = None,
) -> Perplexity:
    """Perplexity of a loaded model, `network`, that `reference` describes. Collective.

    Args:
        dtype: what `network` computes in.
        name: what the result calls the model.
        apart: keep packed documents apart; by default where the model can.
        watch: as `sum_losses` takes it.

    Raises:
        UserError: the tokenizer or the text cannot be used, or losses are not finite.
    """
    from flame.model import count_parameters
    from flame.process.distributed import world_size

    if apart is None:
        apart = keeps_documents_apart(reference.config)
    rows = text.sequences(vocabulary_size(reference.config), apart)
    sums = sum_losses(network, rows, watch)
    _check_finite(sums, reference)
    perplexity, error = math.exp(sums.loss / sums.tokens), standard_error(sums.documents)
    return Perplexity(
        perplexity=perplexity,
        error=None if error is None else perplexity * error,
        documents=sums.documents,
        apart=apart and text.config.varlen,
        bits_per_byte=sums.loss / math.log(2) / sums.bytes,
        tokens=sums.tokens,
        bytes=sums.bytes,
        sequences=sums.sequences,
        parameters=count_parameters(network.parameters()),
        state_bytes=state_bytes(reference.config),
        model=name,
        data=text.name,
        seq_len=text.seq_len,
        dtype=str(dtype).removeprefix("torch."),
        world_size=world_size(),
        versions=versions(),
    )


def sum_losses(model: "nn.Module", rows: "Iterable[Heldout]", watch: Watch | None = None) -> Sums:
    """Losses and counts of `rows`, summed over all ranks. Collective.

    Args:
        watch: is shown each row of this rank with the model's logits [1, T, V], on its device.
    """
    import torch
    import torch.distributed as dist

    from flame.data.packing import IGNORE_INDEX
    from flame.process.dealing import turns
    from flame.process.progress import progress

    counts, sums = torch.zeros(2, dtype=torch.int64), DocumentSums()
    for turn in progress(turns(rows), "evaluate"):
        logits = row_logits(model, turn.item.inputs)
        losses = row_losses(logits, turn.item.labels)
        if turn.counts:
            if watch is not None:
                watch(turn.item, logits)
            sums.add(turn.item.documents, losses, turn.item.labels.flatten() != IGNORE_INDEX)
            counts += torch.tensor([turn.item.bytes, 1])
    if dist.is_initialized():
        dist.all_reduce(counts)
    loss, tokens, documents = sums.reduced()
    size, sequences = counts.tolist()
    return Sums(loss, tokens, size, sequences, documents)


def row_logits(model: "nn.Module", inputs: "Mapping[str, Tensor]") -> "Tensor":
    """Logits [B, T, V] of one batch, without gradients.

    Args:
        inputs: `input`, int64 [B, T], and what else the model's forward takes.
    """
    import torch

    from flame.process.distributed import local_device

    moved = {name: value.to(local_device()) for name, value in inputs.items()}
    with torch.no_grad():
        return model(input_ids=moved.pop("input"), use_cache=False, **moved).logits


def row_losses(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """Negative log-likelihood of each label of one batch, nats, float64 `[B · T]` on the CPU.

    Args:
        logits: [B, T, V].
        labels: int64 [B, T]; -100 is not predicted and costs nothing.
    """
    from torch.nn.functional import cross_entropy

    targets = labels.to(logits.device).flatten()
    losses = cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    return losses.double().cpu()


def _check_finite(sums: Sums, reference: "ModelReference") -> None:
    """Raise UserError if nothing was predicted, or a weight or the loss is not finite."""
    from flame.checkpoint.fingerprint import check_finite

    if sums.tokens == 0 or sums.bytes == 0:
        raise UserError("the held-out text has no token to predict: give longer documents")
    if not math.isfinite(sums.loss):
        check_finite(reference.source())
        raise UserError(
            f"{reference.weights} gives logits that are not finite, though its weights are: "
            f"{float32_advice(reference.config)}"
        )
