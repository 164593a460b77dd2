"""Memory of distillation: the teacher's bytes on a rank.

    python -m benchmarks.distillation [--nproc 1 2 4] [--config CONFIG.json]

They are those of the tensors that are alive on a rank after it was asked, less those before it was
built. The memory of the loss itself: `benchmarks.losses`.
"""

import argparse
import gc
import json
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from launch.drawing.table import Column, Table

MEBIBYTE = 2**20
CONFIG = Path("launch/recipes/demo_config.json")
TEACHER_COLUMNS = (
    Column("processes"),
    Column("parameters", "parameters", ","),
    Column("rank", "rank 0, MiB", ".3f"),
    Column("most", "largest rank, MiB", ".3f"),
    Column("share", "of the whole", ".3f"),
)


def main() -> None:
    options = parse()
    whole = 0.0
    rows = []
    for count in options.nproc:
        held = teacher_bytes(count, options.config)
        whole = whole or sum(held) / MEBIBYTE
        rows.append(teacher_row(options.config, held, whole))
    print(Table(TEACHER_COLUMNS, rows).text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--nproc", type=int, nargs="+", default=[1, 2, 4])
    add("--config", type=Path, default=CONFIG, help="the teacher's config.json")
    return parser.parse_args()


def teacher_bytes(processes: int, config: Path) -> list[int]:
    """What a teacher of this architecture holds on each rank after it was asked."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        what = (processes, f"{folder}/store", str(config), queue)
        torch.multiprocessing.spawn(_hold_teacher, what, nprocs=processes, join=True)
    return [held for _, held in sorted(queue.get() for _ in range(processes))]


def _hold_teacher(rank: int, processes: int, store: str, config: str, queue: object) -> None:
    import os

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        SLIMSTATE_STORE=store,
    )
    import flame.register  # noqa: F401
    from flame.model import initialise, meta_model, restore_after_to_empty, shard
    from flame.process.distributed import data_parallel_mesh, local_device, process_group
    from flame.recovery.distill import Teacher

    torch.set_num_threads(1)
    content = json.loads(Path(config).read_text())
    with process_group():
        before = live_bytes()
        model = shard(meta_model(content), data_parallel_mesh())
        model.to_empty(device=local_device())
        restore_after_to_empty(model)
        initialise(model, content, seed=0)
        teacher = Teacher(model.eval())
        tokens = torch.arange(128, device=local_device())[None]
        for _ in range(2):
            states, _ = teacher.states({"input": tokens})
            teacher.release()
            del states
        queue.put((rank, live_bytes() - before))  # type: ignore[attr-defined]


def live_bytes() -> int:
    """Bytes of all storages that tensors of this process have."""
    gc.collect()
    sizes: dict[int, int] = {}
    with warnings.catch_warnings():
        # Some of the objects are lazy attributes, deprecated ones among them.
        warnings.simplefilter("ignore")
        tensors = [value for value in gc.get_objects() if isinstance(value, Tensor)]
    for value in tensors:
        if value.device.type != "meta":
            _add_storage(value, sizes)
    return sum(sizes.values())


def _add_storage(value: Tensor, sizes: dict[int, int]) -> None:
    inner = getattr(value, "_local_tensor", value)
    storage = inner.untyped_storage()
    sizes[storage._cdata] = storage.nbytes()


def teacher_row(config: Path, held: list[int], whole: float) -> dict[str, object]:
    from flame.model import count_parameters, meta_model

    model = meta_model(json.loads(config.read_text()))
    most = max(held) / MEBIBYTE
    return {
        "processes": len(held),
        "parameters": count_parameters(model.parameters()),
        "rank": held[0] / MEBIBYTE,
        "most": most,
        "share": most / whole,
    }


if __name__ == "__main__":
    main()
