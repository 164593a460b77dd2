"""Private names of torch, and the one that differs between releases."""

from typing import Any

from flame.private.names import PrivateName

_FSDP = "torch.distributed.fsdp._fully_shard"
_DISTRIBUTED = "torch.distributed.distributed_c10d"

NAMES = (
    PrivateName(
        f"{_FSDP}._fsdp_state:FSDPState()._fsdp_param_group",
        "2.11 to 2.13",
        "recovery.distill: the one group of parameters of a module; a property from 2.12 on",
    ),
    PrivateName(
        f"{_FSDP}._fsdp_state:FSDPState()._state_ctx.all_states",
        "2.11 to 2.13",
        "recovery.distill: the states of all modules",
    ),
    PrivateName(
        f"{_FSDP}._fsdp_state:FSDPState()._comm_ctx",
        "2.11 to 2.13",
        "recovery.distill: its `post_forward_order` grows without a backward pass",
    ),
    PrivateName(
        f"{_FSDP}:FSDPModule._get_fsdp_state", "2.11 to 2.13", "recovery.distill: a module's state"
    ),
    PrivateName(
        "torch.distributed.checkpoint.filesystem:_StorageInfo",
        "2.11 to 2.13",
        "checkpoint.save, storage, unpickling: where in a step's files a tensor lies",
    ),
    PrivateName(
        "torch.distributed.checkpoint.metadata:_MEM_FORMAT_ENCODING",
        "2.11 to 2.13",
        "unpickling.index: a field of DCP's index",
    ),
    PrivateName(
        "torch.distributed.checkpoint._traverse:set_element",
        "2.11 to 2.13",
        "storage.load_planner: nested states from flat names",
    ),
    PrivateName(
        "torch.distributed._shard._utils:narrow_tensor_by_index",
        "2.11 to 2.13",
        "storage.safe_reader: the part of a tensor that a rank needs",
    ),
    PrivateName("torch._utils:_rebuild_tensor_v2", "2.11 to 2.13", "unpickling.archive"),
    PrivateName("torch._utils:_rebuild_tensor_v3", "2.11 to 2.13", "unpickling.archive"),
    PrivateName("torch._utils:_rebuild_parameter", "2.11 to 2.13", "unpickling.archive"),
    PrivateName(
        "torch._utils:_get_available_device_type",
        "2.11 to 2.13",
        "process.titan_cpu: what torchtitan takes the device type from",
    ),
    PrivateName(
        f"{_DISTRIBUTED}:_set_pg_timeout", "2.11 to 2.13", "process.titan_cpu: gloo's timeouts"
    ),
    PrivateName(
        f"{_DISTRIBUTED}:_get_default_store",
        "2.11 to 2.13",
        "process.collective_timeout: the store in which ranks say that they live",
    ),
    PrivateName(
        "torch.testing._internal.distributed:fake_pg",
        "2.13",
        "process.one_node: a process group of one process, without a socket",
    ),
    PrivateName(
        "torch:Tensor._is_view", "2.11 to 2.13", "training.headless: views lose FSDP2's hooks"
    ),
    PrivateName(
        "torch.nn:Module()._buffers", "2.11 to 2.13", "checkpoint.load: buffers of one module"
    ),
    PrivateName(
        "torch.nn:Module()._non_persistent_buffers_set",
        "2.11 to 2.13",
        "checkpoint.load: buffers that no state dict holds",
    ),
    PrivateName(
        "torch.optim.lr_scheduler:LRScheduler._initial_step",
        "2.11 to 2.13",
        "training.schedule: it sets `_step_count` and `_last_lr`, which a resume sets again",
    ),
    PrivateName(
        "torch.utils._python_dispatch:TorchDispatchMode",
        "2.11 to 2.13",
        "launch.speed.peak_memory: every operator that runs",
    ),
    PrivateName(
        "torch.utils._pytree:tree_leaves", "2.11 to 2.13", "launch.speed.peak_memory: its results"
    ),
    PrivateName(
        "torch:UntypedStorage()._cdata", "2.11 to 2.13", "launch.speed.peak_memory: its identity"
    ),
)
"""Names that torch has; those with 2.11 were looked up in 2.11.0, 2.12.0 and 2.13.0."""

BY_INSTANCE = ("_step_count", "_last_lr", "_post_forward_indices", "_fsdp_param_groups")
"""Attributes that only an object at work, or only some release, has (2.11 to 2.13; the last from
2.12 on). Tests of a resume and of distillation use them."""


def parameter_groups(state: Any) -> list[Any]:
    """Return the groups of parameters of an FSDP2 module's state.

    Up to torch 2.11 a module has one at most (`_fsdp_param_group`), from 2.12 on a list.
    """
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
