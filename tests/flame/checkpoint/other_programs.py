"""DCP steps as torchtitan, flame and others write them, and reading ours with their tools."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tests.flame.tiny import build


def titan_checkpointer(model: nn.Module, folder: Path, **options: Any) -> Any:
    """torchtitan's own checkpointer of a model with AdamW, a schedule and its train state."""
    import flame.process.titan_cpu  # noqa: F401  (must precede torchtitan)

    # isort: split
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.lr_scheduler import LRSchedulersContainer
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config import Checkpoint

    optimizers = OptimizersContainer([model], torch.optim.AdamW, {"lr": 0.1})
    schedulers = LRSchedulersContainer(optimizers, lambda step: 1.0)
    config = Checkpoint(enable=True, interval=1, keep_latest_k=0, **options)
    return CheckpointManager(
        dataloader=_Loader(),  # type: ignore[arg-type]
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=schedulers,
        states={"train_state": _TrainState()},
        checkpoint_config=config,
        sd_adapter=None,
        base_folder=str(folder),
    )


class _Loader:
    """A data loader with a state like torchtitan's: pickled bytes by rank."""

    def state_dict(self) -> dict[str, Any]:
        return {"dp_rank_0": b"\x80\x04N.", "world_size": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class _TrainState:
    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(4), "ntokens_seen": torch.tensor(99)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def write_titan_run(folder: Path, config: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
    """A run of torchtitan with steps 3 and 4, of sharded ranks; the last one's full tensors."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from flame.model import shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard(build(dict(config)), mesh)
    manager = titan_checkpointer(model, folder, **options)
    for step in (3, 4):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        manager.states["optimizer"].step()
        manager.save(step, last_step=step == 4)
    manager.close()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        for name, value in model.state_dict().items()
    }


def read_with_titan(run: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What torchtitan's checkpointer loads into a sharded model from the latest step of `run`."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from flame.model import shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard(build(dict(config), seed=9), mesh)
    manager = titan_checkpointer(
        model, run, exclude_from_loading=["dataloader", "optimizer", "lr_scheduler", "train_state"]
    )
    assert manager.load()
    manager.close()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        for name, value in model.state_dict().items()
    }


def save_plain(state: dict[str, Any], step: Path) -> Path:
    """A step as a script writes it with DCP alone."""
    dcp.save(state, checkpoint_id=step, no_dist=True)
    return step
