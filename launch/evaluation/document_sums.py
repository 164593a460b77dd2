"""Values of tokens summed by the document that they are of, over all ranks."""

from typing import TYPE_CHECKING

from launch.evaluation.intervals import DocumentLosses, joined

if TYPE_CHECKING:
    from torch import Tensor


class DocumentSums:
    """Float64 sums of a value, and counts, of the predicted tokens of each document of a text."""

    def __init__(self) -> None:
        import torch

        self._sums = torch.zeros(2, 0, dtype=torch.float64)

    def add(self, documents: "Tensor", values: "Tensor", counted: "Tensor") -> None:
        """Add tokens of one row.

        Args:
            documents: int64 `[n]`, the number of each token's document.
            values: `[n]`, what is summed.
            counted: `[n]`, 1 where a token is predicted and 0 elsewhere.
        """
        import torch

        if not len(documents):
            return
        self._grow(int(documents.max()) + 1)
        self._sums.index_add_(1, documents, torch.stack([values.double(), counted.double()]))

    def reduced(self) -> tuple[float, int, DocumentLosses]:
        """The sums of all ranks: in all, the tokens, and by document. Collective."""
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            most = torch.tensor(self._sums.shape[1])
            dist.all_reduce(most, dist.ReduceOp.MAX)
            self._grow(int(most), exactly=True)
            dist.all_reduce(self._sums)
        values, tokens = self._sums
        documents = joined(values.numpy(), tokens.long().numpy())
        return float(values.sum()), int(tokens.sum()), documents

    def _grow(self, size: int, exactly: bool = False) -> None:
        from torch.nn.functional import pad

        have = self._sums.shape[1]
        if size > have:
            # Twice as long at least, so that growing costs no more than adding.
            wanted = size if exactly else max(size, 2 * have)
            self._sums = pad(self._sums, (0, wanted - have))
