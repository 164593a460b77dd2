"""What a plan writes, as a model in memory."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from flame.checkpoint.load import filled
from flame.checkpoint.reference import ModelReference
from flame.model import meta_model, shard
from flame.process.distributed import local_device
from flame.process.peers import Peers
from pruning.planning.plan import Plan
from pruning.transform.sliced_source import InMemory, SlicedSource
from pruning.transform.slices import slices_of


def pruned_model(
    reference: ModelReference, plan: Plan, mesh: DeviceMesh, dtype: torch.dtype
) -> nn.Module:
    """The model that `plan` makes of `reference`, in evaluation mode, sharded over `mesh`.

    Weights are in fp32 and compute in `dtype`. Collective.

    Args:
        plan: the same on every rank; its new tensors, if it has any, are in memory.

    Raises:
        UserError: on every rank, if a tensor is not finite or does not fit the plan.
    """
    model = shard(meta_model(plan.config_after), mesh, dtype)

    def fill() -> nn.Module:
        slices = slices_of(plan, reference.config)
        source = SlicedSource(reference.source(), slices, InMemory(plan.new_tensors))
        return filled(model, source, local_device())

    return Peers().agree(fill)
