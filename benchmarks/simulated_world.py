"""Jobs of many ranks in one process, over real files: the plans, reads and writes of each in turn.

torch's `fake` backend lets collectives return at once with what the rank itself sent. So a rank
takes every step that it would take in a real job, with its own part of a model that is sharded by
FSDP2's rule, and what it reads, writes and sends can be counted.
"""

import math
import pickle
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend)

from flame.checkpoint.save import ChecksumWriter, LazySavePlanner
from flame.checkpoint.steps import step_folder
from flame.process.environment import environment

Shapes = Mapping[str, tuple[int, ...]]


@contextmanager
def rank_of(rank: int, world_size: int, node_size: int) -> Iterator[None]:
    """Let this process be one rank of a job, in which nobody else answers, inside the block."""
    sizes = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": node_size}
    places = {"RANK": rank, "LOCAL_RANK": rank % node_size, "GROUP_RANK": rank // node_size}
    with environment({name: str(value) for name, value in (sizes | places).items()}):
        store = dist.HashStore()
        dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()


def training_state(weights: Shapes, replicated: Shapes) -> dict[str, Any]:
    """Return this rank's part of a step: weights and AdamW's moments, in torchtitan's names.

    Args:
        weights: shapes of the weights that FSDP2 shards over all ranks.
        replicated: shapes of those that each rank keeps whole.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {}
    for name, shape in {**weights, **replicated}.items():
        for entry in (name, *(f"optimizer.state.{name}.{m}" for m in ("exp_avg", "exp_avg_sq"))):
            state[entry] = _sharded(shape, mesh) if name in weights else torch.ones(shape)
        state[f"optimizer.state.{name}.step"] = torch.tensor(1.0)
    return {**state, "train_state": {"step": 1}}


def _sharded(shape: tuple[int, ...], mesh: Any) -> DTensor:
    """Return a DTensor of random numbers, of which this rank has the rows that FSDP2 gives it."""
    rows = -(-shape[0] // mesh.size())
    own = max(0, min(rows, shape[0] - rows * mesh.get_local_rank()))
    local: Tensor = torch.rand((own, *shape[1:]))
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    size = torch.Size(shape)
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)


def local_plan(state: Mapping[str, Any], folder: Path) -> tuple[SavePlan, Any, ChecksumWriter]:
    """Return what this rank sends to the first one before a step is saved, and who writes it."""
    planner, writer = LazySavePlanner(), ChecksumWriter(folder, {})
    first = dist.get_rank() == 0
    planner.set_up_planner(dict(state), writer.storage_meta(), first)
    writer.set_up_storage_writer(first, rank=dist.get_rank(), use_collectives=True)
    return writer.prepare_local_plan(planner.create_local_plan()), planner, writer


def write_step(
    checkpoints: Path,
    step: int,
    weights: Shapes,
    replicated: Shapes,
    world_size: int,
    node: int,
    work: dict[str, float] | None = None,
) -> Path:
    """Write a whole step as `world_size` ranks do, one after another; return its folder.

    Into `work` go what rank 0 alone does: `plan bytes` that it receives, all as long as the
    longest, and `seconds` of planning for all and of writing the index.
    """
    folder = step_folder(checkpoints, step)
    folder.mkdir(parents=True)
    of_ranks = []
    for rank in range(world_size):
        with rank_of(rank, world_size, node):
            of_ranks.append(local_plan(training_state(weights, replicated), folder))
    first_planner, first_writer = of_ranks[0][1:]
    begin = time.perf_counter()
    plans, metadata = first_planner.create_global_plan([plan for plan, _, _ in of_ranks])
    plans = first_writer.prepare_global_plan(plans)
    planning = time.perf_counter() - begin
    results = []
    for plan, (_, planner, writer) in zip(plans, of_ranks, strict=True):
        results.append(writer.write_data(planner.finish_plan(plan), planner).value())
    begin = time.perf_counter()
    first_writer.finish(metadata, results)
    if work is not None:
        longest = max(len(pickle.dumps(plan)) for plan, _, _ in of_ranks[:2])
        work |= {"plan bytes": world_size * longest}
        work |= {"seconds": planning + time.perf_counter() - begin}
    return folder


def bytes_read() -> int:
    """Return the bytes that this process's read calls have returned, as the kernel counts them."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar:")[1].split()[0]) - len(text)
