"""Time and peak memory of the loss, from hidden states to the gradients of states and head.

    python -m benchmarks.losses [--vocabulary 2048 32000 128000] [--tokens 1024] [--width 256]
                                [--repeats 3] [--plain-limit 8] [--chunk-tokens 0]

The ways, each forward and backward, in turn in every round: ours in chunks, fla's fused linear
cross entropy, and plain logits by autograd; then with a teacher, ours and plain (fla has no such
sum). On CUDA states and weights are bf16, times are between events and the peak is the allocator's;
on a CPU they are fp32, fla's code runs over this project's operators, and the peak counts tensors.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from launch.drawing.table import Column, Table
from launch.speed.peak_memory import peak_bytes
from launch.speed.timing import take_turns, timed

MEBIBYTE = 2**20
TEMPERATURE = 2.0
Step = Callable[["Problem"], Tensor]
COLUMNS = (
    Column("vocabulary", "vocabulary", ","),
    Column("tokens", "tokens", ","),
    Column("way", "way", align="left"),
    Column("milliseconds", "ms, median", ",.1f"),
    Column("ratio", "÷ plain", ".3f"),
    Column("peak", "peak, MiB", ",.0f"),
    Column("beyond", "… less the gradients, MiB", ",.0f"),
    Column("difference", "loss, ÷ plain − 1", ".1e"),
)


def main() -> None:
    options = parse()
    rows = [
        row
        for vocabulary in options.vocabulary
        for row in measured(random_problem(vocabulary, options), options)
    ]
    print(Table(COLUMNS, rows).text())


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    sizes = [32000, 151936] if on_gpu else [2048, 32000, 128000]
    add("--vocabulary", type=int, nargs="+", default=sizes)
    add("--tokens", type=int, default=16384 if on_gpu else 1024)
    add("--width", type=int, default=2048 if on_gpu else 256, help="of the hidden states")
    add("--repeats", type=int, default=10 if on_gpu else 3)
    add("--chunk-tokens", type=int, default=0, help="of our chunks; 0: as training chooses")
    add("--plain-limit", type=float, default=8.0, help="GiB of fp32 logits of the plain way")
    return parser.parse_args()


@dataclass(frozen=True)
class Problem:
    """Hidden states `[1, N, D]` and output weights `[V, D]` of student and teacher, and labels."""

    states: Tensor
    weight: Tensor
    teacher_states: Tensor
    teacher_weight: Tensor
    labels: Tensor
    chunk_tokens: int

    @property
    def wanted(self) -> tuple[Tensor, Tensor]:
        return self.states, self.weight

    @property
    def gradient_bytes(self) -> int:
        return self.states.nbytes + self.weight.nbytes


def random_problem(vocabulary: int, options: argparse.Namespace) -> Problem:
    """Logits have a standard deviation of one; a label in 64 is ignored."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    states, weights = (1, options.tokens, options.width), (vocabulary, options.width)
    labels = torch.randint(vocabulary, (1, options.tokens), device=device)
    labels[:, ::64] = -100

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    scale = options.width**-0.5
    return Problem(
        normal(states).requires_grad_(),
        (normal(weights) * scale).requires_grad_(),
        normal(states),
        normal(weights) * scale,
        labels,
        options.chunk_tokens,
    )


def measured(problem: Problem, options: argparse.Namespace) -> list[dict[str, object]]:
    ways: dict[str, Step] = {"ours": ours, "fla": fla_fused, "plain": plain}
    taught: dict[str, Step] = {"ours, teacher": ours_taught, "plain, teacher": plain_taught}
    vocabulary, tokens = problem.weight.shape[0], problem.labels.numel()
    if vocabulary * tokens * 4 > options.plain_limit * 2**30:
        del ways["plain"], taught["plain, teacher"]
    return [*_rows(ways, problem, options.repeats), *_rows(taught, problem, options.repeats)]


def _rows(ways: dict[str, Step], problem: Problem, repeats: int) -> list[dict[str, object]]:
    device = problem.states.device
    losses = {name: float(step(problem)) for name, step in ways.items()}
    peaks = {n: peak_bytes(partial(step, problem), device) for n, step in ways.items()}
    actions = {n: partial(timed, partial(step, problem), device) for n, step in ways.items()}
    times = {n: statistics.median(runs) for n, runs in take_turns(actions, repeats).items()}
    base = next((name for name in ways if name.startswith("plain")), None)
    return [
        {
            "vocabulary": problem.weight.shape[0],
            "tokens": problem.labels.numel(),
            "way": name,
            "milliseconds": 1000 * times[name],
            "ratio": times[name] / times[base] if base else None,
            "peak": peaks[name] / MEBIBYTE,
            "beyond": (peaks[name] - problem.gradient_bytes) / MEBIBYTE,
            "difference": losses[name] / losses[base] - 1 if base else None,
        }
        for name in ways
    ]


def ours(problem: Problem) -> Tensor:
    from flame.training.losses.chunked import Projection, chunked_losses

    total, _, _ = chunked_losses(
        problem.states,
        Projection(problem.weight),
        problem.labels,
        chunk_tokens=problem.chunk_tokens,
    )
    return _backward(total, problem)


def ours_taught(problem: Problem) -> Tensor:
    from flame.training.losses.chunked import Projection, chunked_losses
    from flame.training.losses.tokens import Mix

    total, _, _ = chunked_losses(
        problem.states,
        Projection(problem.weight),
        problem.labels,
        teacher=(problem.teacher_states, Projection(problem.teacher_weight)),
        mix=Mix(1.0, 1.0, TEMPERATURE),
        chunk_tokens=problem.chunk_tokens,
    )
    return _backward(total, problem)


def fla_fused(problem: Problem) -> Tensor:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    import flame.register  # noqa: F401

    return _backward(
        fused_linear_cross_entropy_loss(
            problem.states.flatten(0, 1), problem.labels.flatten(), problem.weight, reduction="sum"
        ),
        problem,
    )


def plain(problem: Problem) -> Tensor:
    logits = nn.functional.linear(problem.states, problem.weight).flatten(0, 1).float()
    entropy = nn.functional.cross_entropy(logits, problem.labels.flatten(), reduction="sum")
    return _backward(entropy, problem)


def plain_taught(problem: Problem) -> Tensor:
    """What a person would write: full logits of both, cross entropy and `kl_div` by autograd."""
    logits = nn.functional.linear(problem.states, problem.weight).flatten(0, 1).float()
    with torch.no_grad():
        told = nn.functional.linear(problem.teacher_states, problem.teacher_weight)
    labels = problem.labels.flatten()
    entropy = nn.functional.cross_entropy(logits, labels, reduction="sum")
    divergence = nn.functional.kl_div(
        (logits / TEMPERATURE).log_softmax(-1),
        (told.flatten(0, 1).float() / TEMPERATURE).log_softmax(-1),
        log_target=True,
        reduction="none",
    )
    kl = divergence.sum(-1)[labels != -100].sum()
    return _backward(entropy + TEMPERATURE**2 * kl, problem)


def _backward(total: Tensor, problem: Problem) -> Tensor:
    torch.autograd.grad(total, problem.wanted)
    return total.detach()


if __name__ == "__main__":
    main()
