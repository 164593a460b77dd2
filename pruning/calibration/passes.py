"""One pass of a calibrated model over a sequence."""

import torch
from torch import Tensor, nn

from flame.process.distributed import local_device
from pruning.calibration.gradients import WeightGradients


def run_batch(
    model: nn.Module,
    batch: tuple[dict[str, Tensor], Tensor] | None,
    gradients: WeightGradients | None,
) -> None:
    """Run the model on a sequence, or without one on a token that is not counted."""
    nothing = torch.zeros((1, 1), dtype=torch.int64)
    inputs, labels = batch if batch is not None else ({"input": nothing}, nothing)
    given = {name: value.to(local_device()) for name, value in inputs.items()}
    if gradients is not None:
        gradients.backward(model, given, labels.to(local_device()), counts=batch is not None)
        return
    # Logits are not looked at, and those of all tokens would take most of the memory.
    with torch.no_grad():
        model(input_ids=given.pop("input"), use_cache=False, logits_to_keep=1, **given)
