"""A model for evaluation: whole on every rank where it fits, else sharded over all of them.

A whole model is the faster one: its ranks need each other only to hand over answers. FSDP2 gathers
a sharded model's weights from all ranks in every forward pass, so all must make as many.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from flame.checkpoint.load import build_sharded, load_model
from flame.errors import UserError, first_line
from flame.hugging_face.companions import GENERATION_CONFIG
from flame.model import count_parameters, meta_model
from flame.process.distributed import (
    data_parallel_mesh,
    device_type,
    gather_objects,
    local_device,
    rank,
    world_size,
)
from flame.storage.json_file import read_object

if TYPE_CHECKING:
    from flame.checkpoint.reference import ModelReference

Placement = Literal["auto", "whole", "sharded"]
PLACEMENTS: tuple[Placement, ...] = ("auto", "whole", "sharded")

FREE_SHARE = 0.4
"""Share of a process's free memory that a whole model's weights may take."""


@dataclass(frozen=True)
class Network:
    """A model in evaluation mode, and how it lies on the ranks."""

    model: nn.Module
    dtype: torch.dtype
    """Of the forward pass."""

    sharded: bool

    @contextmanager
    def company(self) -> Iterator[None]:
        """Let ranks make different numbers of forward passes in the block. Collective.

        A rank that leaves the block early makes dummy passes until all have left it. Where one
        fails, the others wait for it until the process group gives up.
        """
        if not (self.sharded and world_size() > 1):
            yield
            return
        announcement = self.model.register_forward_pre_hook(_announce)
        try:
            yield
        finally:
            announcement.remove()
        while _any_busy(False):
            self.dummy_forward()

    @torch.no_grad()
    def dummy_forward(self) -> None:
        """One forward pass over one token, for the sake of the other ranks."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=local_device())
        self.model(input_ids=token, use_cache=False)


def load_network(
    reference: "ModelReference", dtype: torch.dtype, placement: Placement = "auto"
) -> Network:
    """The model of `reference`, computing in `dtype`. Collective.

    Args:
        placement: `whole` on every rank, `sharded` over all, or `auto`: whole where it fits.
    """
    if placement == "auto":
        placement = "whole" if fits_whole(reference.config, dtype) else "sharded"
    sharded = placement == "sharded"
    if sharded:
        model = build_sharded(reference, data_parallel_mesh(), dtype)
    else:
        model = load_model(reference, dtype, local_device())
    _read_generation_config(model, reference.folder)
    return Network(model, dtype, sharded)


def _read_generation_config(model: nn.Module, folder: Path) -> None:
    """Let the model stop where its publisher says, if that differs from `config.json`.

    Raises:
        UserError: the file is damaged or transformers refuses what it says.
    """
    from transformers import GenerationConfig

    path = folder / GENERATION_CONFIG
    if path.is_file():
        content = read_object(path)
        try:
            model.generation_config = GenerationConfig.from_dict(content)
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is refused: {first_line(error)}") from error


def fits_whole(config: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether every rank has room for the weights of a whole model. Collective."""
    if world_size() == 1:
        return True
    need = count_parameters(meta_model(config).parameters()) * dtype.itemsize
    return all(gather_objects(need <= FREE_SHARE * free_memory()))


def free_memory() -> float:
    """Bytes that this process can take: of its device, or its share of the host's memory."""
    if device_type() == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _free_host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_host_memory() -> int:
    """Bytes that Linux says are available; elsewhere half of what the machine has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(li.split()[1]) * 1024 for li in lines if li.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _announce(module: nn.Module, arguments: Any) -> None:
    _any_busy(True)


def _any_busy(busy: bool) -> bool:
    """Whether any rank is about to make a forward pass of its own. Collective."""
    flag = torch.tensor([int(busy)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def own_share(groups: list[list[int]]) -> list[int]:
    """The members of every `world_size`-th group, this rank's among `groups`."""
    return [member for group in groups[rank() :: world_size()] for member in group]
