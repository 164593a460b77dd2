"""What is measured of each model of a sweep: its losses, and how far it is from the dense model.

One pass over the held-out rows gives both. The dense model's predictions are kept for all models of
a process as far as `KEPT_BYTES` go; beyond, the dense model is run beside each of them.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launch.evaluation.document_sums import DocumentSums
from launch.evaluation.fidelity import POSITIONS, divergence
from launch.evaluation.heldout_text import HeldoutText

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from flame.data.heldout import Heldout

KEPT_BYTES = 2**30
"""Bytes of the dense model's log-probabilities, float32, that a process keeps in memory."""

MEASURED = (
    "perplexity", "bits_per_byte", "tokens", "parameters", "state_bytes", "error", "documents",
)  # fmt: skip


@dataclass(frozen=True)
class TextInMemory(HeldoutText):
    """Held-out text that is read and cut once, for all models of a process."""

    rows: dict[tuple[int, bool], list[Any]] = field(default_factory=dict, compare=False)

    def sequences(self, vocab_size: int, apart: bool) -> Iterator[Any]:
        key = (vocab_size, apart)
        if key not in self.rows:
            self.rows[key] = list(super().sequences(vocab_size, apart))
        return iter(self.rows[key])


def in_memory(text: HeldoutText) -> TextInMemory:
    """`text` that is read when it is first asked for, and kept."""
    values = {f.name: getattr(text, f.name) for f in dataclasses.fields(HeldoutText)}
    return TextInMemory(**values)


@dataclass
class Dense:
    """The dense model's predictions on the rows of a text, computed when they are first needed."""

    model: str
    dtype: str
    kept: dict[int, "Tensor"] = field(default_factory=dict)
    """Log-probabilities of predicted tokens, float32 [n, V], by the number of the row."""

    room: int = KEPT_BYTES
    network: "nn.Module | None" = None

    def log_probabilities(self, number: int, row: "Heldout") -> "Tensor":
        """Of the predicted tokens of row `number`, float32 [n, V]."""
        from launch.evaluation.perplexity import row_logits

        if number in self.kept:
            return self.kept[number]
        if self.network is None:
            self.network = _loaded(self.model, _dtype(self.dtype))
        logits = row_logits(self.network, row.inputs).flatten(0, 1)
        found = logits[_predicted(row).to(logits.device)].float().log_softmax(-1)
        size = found.numel() * found.element_size()
        if size <= self.room:
            self.room -= size
            self.kept[number] = found
        return found


class Divergence:
    """Sums KL(dense ‖ model) over the rows that it is shown, by document."""

    def __init__(self, dense: Dense) -> None:
        self.dense, self.sums, self.rows = dense, DocumentSums(), 0

    def __call__(self, row: "Heldout", logits: "Tensor") -> None:
        """Add a row, whose logits of the model are [1, T, V]."""
        import torch

        theirs, places = self.dense.log_probabilities(self.rows, row), _predicted(row)
        self.rows += 1
        ours = logits.flatten(0, 1)[places.to(logits.device)]
        parts = (each.split(POSITIONS) for each in (places, ours, theirs))
        for at, mine, dense in zip(*parts, strict=True):
            kl = divergence(mine, dense)[0].cpu()
            self.sums.add(row.documents[at], kl, torch.ones_like(kl))

    def record(self) -> dict[str, Any]:
        """`kl`, nats a predicted token, and `divergences`, its sums by document, for JSON."""
        total, tokens, documents = self.sums.reduced()
        return {"kl": total / max(tokens, 1), "divergences": documents.record()}


def measured(model: str, text: TextInMemory, dtype: str, name: str, dense: Dense) -> dict[str, Any]:
    """What a record of a sweep holds of a model, measured by this process alone.

    Raises:
        UserError: the text cannot be used, or the model's losses are not finite.
    """
    from flame.checkpoint.reference import resolve
    from launch.evaluation.perplexity import measure_perplexity

    reference, computed_in, divergence = resolve(model), _dtype(dtype), Divergence(dense)
    network = _loaded(model, computed_in)
    found = measure_perplexity(
        network, reference, text, computed_in, name, watch=divergence
    ).record()
    return {**{key: found[key] for key in MEASURED}, **divergence.record()}


def _predicted(row: "Heldout") -> "Tensor":
    """Places of the row's predicted tokens."""
    from flame.data.packing import IGNORE_INDEX

    return (row.labels.flatten() != IGNORE_INDEX).nonzero().flatten()


def _dtype(name: str) -> "torch.dtype":
    from flame.process.distributed import compute_dtype

    return compute_dtype(name)


def _loaded(model: str, dtype: "torch.dtype") -> "nn.Module":
    from flame.checkpoint.reference import resolve
    from launch.lm.network import load_network

    return load_network(resolve(model), dtype, "whole").model
