"""Memory of distillation: the teacher's bytes on a rank, and the peak of the loss in chunks.

    python -m benchmarks.distillation [--nproc 1 2 4] [--config CONFIG.json]
                                      [--tokens 512 2048 8192] [--vocabulary 4096 32000 128000]

The teacher's bytes are those of the tensors that are alive on a rank after it was asked, less those
before it was built. The peak is over the forward and backward pass of CE + T² KL, from the hidden
states of student and teacher to the gradients of the student's states and output weight, beyond the
tensors that were given; the plain way computes both models' full logits.
"""

import argparse
import gc
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from launch.drawing.table import Column, Table

MEBIBYTE = 2**20
CONFIG = Path("launch/recipes/demo_config.json")
TEMPERATURE = 2.0
TEACHER_COLUMNS = (
    Column("processes"),
    Column("parameters", "parameters", ","),
    Column("rank", "rank 0, MiB", ".3f"),
    Column("most", "largest rank, MiB", ".3f"),
    Column("share", "of the whole", ".3f"),
)
PEAK_COLUMNS = (
    Column("vocabulary", "vocabulary", ","),
    Column("tokens", "tokens", ","),
    Column("chunk", "tokens a chunk", ","),
    Column("weight", "output weight, MiB", ",.0f"),
    Column("chunked", "in chunks, MiB", ",.0f"),
    Column("beyond", "… less states' and weight's gradients, MiB", ",.0f"),
    Column("plain", "plain, MiB", ",.0f"),
)


def main() -> None:
    options = parse()
    processes = [count for count in options.nproc if count > 0]
    if processes:
        whole = 0.0
        rows = []
        for count in processes:
            held = teacher_bytes(count, options.config)
            whole = whole or sum(held) / MEBIBYTE
            rows.append(teacher_row(options.config, held, whole))
        print(Table(TEACHER_COLUMNS, rows).text(), end="\n\n", flush=True)
    sizes = [(size, count) for size in options.vocabulary for count in options.tokens]
    rows = [peak_row(*size, options.width, options.plain_limit) for size in sizes]
    print(Table(PEAK_COLUMNS, rows).text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--nproc", type=int, nargs="+", default=[1, 2, 4], help="0: leave the teacher out")
    add("--config", type=Path, default=CONFIG, help="the teacher's config.json")
    add("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    add("--vocabulary", type=int, nargs="+", default=[4096, 32000, 128000])
    add("--width", type=int, default=64, help="of the hidden states")
    add(
        "--plain-limit",
        type=float,
        default=4.0,
        help="GiB of logits; the plain way beyond it is left out",
    )
    return parser.parse_args()


# The teacher ---------------------------------------------------------------------------------


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


# The loss ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Hidden states `[1, N, D]` and output weights `[V, D]` of student and teacher, and labels."""

    states: Tensor
    weight: Tensor
    teacher_states: Tensor
    teacher_weight: Tensor
    labels: Tensor


def random_problem(vocabulary: int, tokens: int, width: int) -> Problem:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    return Problem(
        torch.randn(1, tokens, width, device=device, requires_grad=True),
        torch.randn(vocabulary, width, device=device, requires_grad=True),
        torch.randn(1, tokens, width, device=device),
        torch.randn(vocabulary, width, device=device),
        torch.randint(vocabulary, (1, tokens), device=device),
    )


def peak_row(vocabulary: int, tokens: int, width: int, limit: float) -> dict[str, object]:
    from flame.training.losses import LOGITS_AT_A_TIME
    from launch.speed.peak_memory import peak_bytes

    problem = random_problem(vocabulary, tokens, width)
    device = problem.states.device
    chunked = peak_bytes(lambda: chunked_step(problem), device)
    gradients = problem.states.nbytes + problem.weight.nbytes
    fits = vocabulary * tokens * 4 <= limit * 2**30
    plain = peak_bytes(lambda: plain_step(problem), device) / MEBIBYTE if fits else None
    return {
        "vocabulary": vocabulary,
        "tokens": tokens,
        "chunk": min(tokens, max(1, LOGITS_AT_A_TIME // vocabulary)),
        "weight": problem.weight.nbytes / MEBIBYTE,
        "chunked": chunked / MEBIBYTE,
        "beyond": (chunked - gradients) / MEBIBYTE,
        "plain": plain,
    }


def chunked_step(problem: Problem) -> None:
    from flame.training.losses import Mix, Projection, chunked_losses

    told = (problem.teacher_states, Projection(problem.teacher_weight))
    total, _, _ = chunked_losses(
        problem.states,
        Projection(problem.weight),
        problem.labels,
        teacher=told,
        mix=Mix(1.0, 1.0, TEMPERATURE),
    )
    torch.autograd.grad(total, (problem.states, problem.weight))


def plain_step(problem: Problem) -> None:
    """What a person would write: full logits of both, cross entropy and `kl_div` by autograd."""
    logits = nn.functional.linear(problem.states, problem.weight).flatten(0, 1)
    with torch.no_grad():
        told = nn.functional.linear(problem.teacher_states, problem.teacher_weight).flatten(0, 1)
    entropy = nn.functional.cross_entropy(logits, problem.labels.flatten(), reduction="sum")
    kl = nn.functional.kl_div(
        (logits / TEMPERATURE).log_softmax(-1),
        (told / TEMPERATURE).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    total = entropy + TEMPERATURE**2 * kl
    torch.autograd.grad(total, (problem.states, problem.weight))


if __name__ == "__main__":
    main()
