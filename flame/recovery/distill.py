"""The teacher of a distillation run, sharded as its student is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flame.checkpoint.load import build_sharded
from flame.checkpoint.reference import ModelReference
from flame.private.torch_names import parameter_groups
from flame.training.headless import output_head, run_headless


class Teacher:
    """A model that runs and is not trained, sharded by FSDP2 over the student's mesh.

    A rank holds `1 / shards` of its weights. A layer is gathered while it runs; the output
    projection and the input embedding stay gathered until `release`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)

    @classmethod
    def build(cls, reference: ModelReference, mesh: DeviceMesh, dtype: torch.dtype) -> "Teacher":
        """Load the model of `reference` over `mesh`, to compute in `dtype`. Collective."""
        return cls(build_sharded(reference, mesh, dtype))

    @property
    def head(self) -> nn.Module:
        """The output projection."""
        return output_head(self.model)

    @torch.no_grad()
    def states(
        self, inputs: Mapping[str, Any], every_layer: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the states before the output projection, `[B, T, D]`, and those after each layer.

        The second is empty unless `every_layer`; `inputs` are as in `run_headless`.
        """
        output = run_headless(self.model, inputs, output_hidden_states=every_layer)
        return output.logits, output.hidden_states[1:] if every_layer else ()

    def release(self) -> None:
        """Free the gathered output projection and embedding; this rank keeps only its shards."""
        if not hasattr(self.model, "reshard"):
            return
        self.model.reshard()
        _forget_forward_order(self.model)


def _forget_forward_order(model: nn.Module) -> None:
    """Empty FSDP2's record of forward passes, which grows with every batch without a backward."""
    state = model._get_fsdp_state()  # type: ignore[operator]
    for part in state._state_ctx.all_states:
        for group in parameter_groups(part):
            group._post_forward_indices.clear()
    state._comm_ctx.post_forward_order.clear()
