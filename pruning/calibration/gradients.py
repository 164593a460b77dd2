"""Gradients of a calibration's loss with respect to the projections of a model, under FSDP2.

The loss and its backward pass are the trainer's, and FSDP2 reduces the gradients over the ranks. No
other parameter gets a gradient, and no optimizer step is taken. Sums are float64 and sharded like
the weights, so each process holds its own rows only.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flame.errors import UserError
from flame.models.gpu_limits import check_backward
from flame.training.objective import next_token_loss
from pruning.spaces import Space
from pruning.statistics import GradientShare, Shard, Source, Statistic
from pruning.statistics.gradients import projections

ReadRows = Callable[[str, slice], Tensor]
"""Rows of a saved tensor."""


def check_gradients(kinds: Iterable[type[Statistic]], config: Mapping[str, Any]) -> None:
    """Raise UserError if statistics need a backward pass that this machine's kernels refuse."""
    if any(kind.source is Source.WEIGHT_GRADIENT for kind in kinds):
        check_backward(config)


class WeightGradients:
    """The gradients of all sequences so far, summed."""

    def __init__(self, model: nn.Module, spaces: Iterable[Space]) -> None:
        """Let only the projections of `spaces` in the sharded `model` have gradients.

        The model is put into training mode, in which fla's layers take operators with a backward
        pass.
        """
        self.layers = {axis.fqn: space.layer for space in spaces for axis in projections(space)}
        model.requires_grad_(False).train()
        named = dict(model.named_parameters())
        self.weights: dict[str, DTensor] = {}
        for name in self.layers:
            weight = named[name].requires_grad_(True)
            assert isinstance(weight, DTensor)
            self.weights[name] = weight
        with torch.no_grad():
            self.totals = {
                name: torch.zeros_like(weight, dtype=torch.float64)
                for name, weight in self.weights.items()
            }

    def backward(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, counts: bool
    ) -> None:
        """Run forward and backward on one sequence of every rank. Collective.

        Args:
            model: the sharded model.
            inputs, labels: this rank's sequence.
            counts: False for a sequence that must add nothing; it runs nevertheless, since the
                ranks reduce together.
        """
        with warnings.catch_warnings():
            # The loss changes nothing in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            loss = next_token_loss(model, inputs, labels)
        (loss if counts else loss * 0).backward()

    @torch.no_grad()
    def add(self, sequences: str) -> None:
        """Add the gradients that `backward` left to the sums.

        Raises:
            UserError: a gradient is not finite; the message names its layer and `sequences`.
        """
        bad = None
        for name, weight in self.weights.items():
            gradient, weight.grad = weight.grad, None
            assert isinstance(gradient, DTensor)
            if bad is None and not bool(gradient.to_local().isfinite().all()):
                bad = name
            self.totals[name] += gradient
        if bad is not None:
            raise UserError(
                f"layer {self.layers[bad]}, {sequences}: the gradient of {bad} holds a NaN or an "
                "infinity: check the model's weights and the precision that calibration runs in"
            )

    def share(self, space: Space, tokens: int) -> GradientShare:
        """This process's rows of the weights and summed gradients of the projections of `space`."""
        names = [axis.fqn for axis in projections(space)]
        shards = {
            name: Shard(
                self.weights[name].detach().to_local(),
                self.totals[name].to_local(),
                _rows(self.totals[name]).start,
            )
            for name in names
        }
        return GradientShare(space, shards, tokens)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the gathered sum of each projection. Collective for each of them."""
        for name, total in self.totals.items():
            yield name, total.full_tensor().cpu()

    @torch.no_grad()
    def load(self, read: ReadRows) -> None:
        """Replace the sums by saved ones, of which this process reads its own rows."""
        for name, total in self.totals.items():
            rows = _rows(total)
            if rows.stop > rows.start:
                total.to_local().copy_(read(name, rows))


def _rows(tensor: DTensor) -> slice:
    """The rows of the whole tensor that this process holds."""
    local = tensor.to_local()
    if local.numel() == 0:
        return slice(0, 0)
    chunk = tensor.__create_chunk_list__()[0]
    return slice(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
