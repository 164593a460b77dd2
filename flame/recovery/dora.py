"""Weight-decomposed adapters (DoRA, arXiv 2402.09353) that are correct in bf16 and when sharded.

The effective weight is `m · (W + s B A) / ‖W + s B A‖` with norms of rows, constants in the
backward pass (section 4.3). peft keeps `m` and the norm in the compute dtype, where bf16 rounds
`m / norm` to 1/256. Here both are fp32 (`flame.model.full_precision_parameters`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flame.lora.names import MAGNITUDE
from flame.model import copy_full


class Magnitude(nn.Module):
    """Replaces peft's `DoraLinearLayer`, with the same parameter name and the same call."""

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dtype=torch.float32, device=device))

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Linear,
        base_result: Tensor | None = None,
        adapter_name: str = "",
    ) -> Tensor:
        """Return what must be added to the base layer's output for `x` `[…, d_in]`: `[…, d_out]`.

        Args:
            base_result: the base layer's output for `x`; None if dropout changed `x` since.
        """
        norm = _row_norms(base_layer.weight, lora_A.weight, lora_B.weight, scaling)
        scale = self.weight.float() / norm
        if base_result is None:
            plain = nn.functional.linear(x, base_layer.weight)
        else:
            plain = base_result if base_layer.bias is None else base_result - base_layer.bias
        low_rank = lora_B(lora_A(x)) * scaling
        return (scale - 1).to(x.dtype) * plain + scale.to(x.dtype) * low_rank


@torch.no_grad()
def _row_norms(weight: Tensor, down: Any, up: Any, scaling: float) -> Tensor:
    """Return `‖W + s B A‖` of each row, in fp32."""
    merged = torch.addmm(weight.float(), up.float(), down.float(), alpha=scaling)
    return torch.linalg.vector_norm(merged, dim=1)


def use_own_layers(model: nn.Module, adapter: str) -> None:
    """Replace the DoRA layers that peft put into `model` for `adapter` by `Magnitude`."""
    for module in model.modules():
        vectors = getattr(module, MAGNITUDE, None)
        if vectors is not None and adapter in vectors:
            weight = vectors[adapter].weight
            vectors[adapter] = Magnitude(weight.shape[0], weight.device)


@torch.no_grad()
def initialise_magnitudes(model: nn.Module, adapter: str) -> None:
    """Set every `m` to the row norms of its base weight, loaded and maybe sharded. Collective."""
    for module in model.modules():
        vectors = getattr(module, MAGNITUDE, None)
        if vectors is None or adapter not in vectors:
            continue
        weight = module.base_layer.weight  # type: ignore[union-attr]
        norms = torch.linalg.vector_norm(weight.float(), dim=1)
        copy_full(
            vectors[adapter].weight, norms.full_tensor() if isinstance(norms, DTensor) else norms
        )
