"""Training tokens/s of the gated delta rule on a CPU, beside transformers' and fla's.

    python -m benchmarks.cpu_operators [--threads 1] [--rounds 7]

Beside transformers' pure-PyTorch chunks and fla's naive token loop, on the same shapes. A
measurement is one forward and backward on random float32 input. In every round each
implementation runs once, in turn, so that they meet the same load; the best round of each counts.
Packed documents, which only ours takes, are given to the others one by one.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.table import Column, Table

Operator = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Shape:
    documents: tuple[int, ...]
    heads: int
    d_k: int
    d_v: int

    @property
    def tokens(self) -> int:
        return sum(self.documents)


SHAPES = (
    Shape((1024,), 4, 32, 64),
    Shape((100, 250, 1, 249, 300, 124), 4, 32, 64),
    Shape((32,) * 32, 4, 32, 64),
    Shape((1024,), 4, 64, 128),
    Shape((512,), 4, 128, 128),
)

COLUMNS = (
    Column("documents"),
    Column("heads"),
    Column("d_k"),
    Column("d_v"),
    Column("ours", "ours, tokens/s", ",.0f"),
    Column("transformers", "transformers, tokens/s", ",.0f"),
    Column("naive", "fla naive, tokens/s", ",.0f"),
    Column("gain_transformers", "ours : transformers", ".2f"),
    Column("gain_naive", "ours : fla naive", ".1f"),
)


def inputs(shape: Shape) -> list[Tensor]:
    """Return q, k, v, g, beta `[1, T, H, ...]` as a layer makes them; leaves with gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(1, shape.tokens, shape.heads, *size, generator=generator)

    q, k = (F.normalize(normal(shape.d_k), dim=-1) for _ in range(2))
    made = [q, k, normal(shape.d_v), F.logsigmoid(normal() + 3), normal().sigmoid()]
    return [x.requires_grad_() for x in made]


def ours(shape: Shape, x: list[Tensor]) -> Tensor:
    from kernels.gated_delta_rule import chunk_gated_delta_rule

    bounds = torch.tensor((0, *shape.documents)).cumsum(0)
    return chunk_gated_delta_rule(*x, cu_seqlens=bounds)[0]


def transformers_fallback(shape: Shape, x: list[Tensor]) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next

    dispatching = modeling_qwen3_next.torch_chunk_gated_delta_rule
    operator = getattr(dispatching, "__wrapped__", dispatching)
    return one_by_one(shape, x, lambda q, k, v, g, beta: operator(q, k, v, g=g, beta=beta))


def fla_naive(shape: Shape, x: list[Tensor]) -> Tensor:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule as operator

    return one_by_one(shape, x, lambda q, k, v, g, beta: operator(q, k, v, beta, g))


def one_by_one(shape: Shape, x: list[Tensor], operator: Operator) -> Tensor:
    parts = zip(*(tensor.split(shape.documents, 1) for tensor in x), strict=True)
    return torch.cat([operator(*part)[0] for part in parts], 1)


IMPLEMENTATIONS = {"ours": ours, "transformers": transformers_fallback, "naive": fla_naive}


def measure(shape: Shape, rounds: int) -> dict[str, float]:
    """Return tokens/s of each implementation, after checking that they agree."""
    x = inputs(shape)
    outputs = {name: run(shape, x) for name, run in IMPLEMENTATIONS.items()}
    for name, out in outputs.items():
        torch.testing.assert_close(out, outputs["naive"], rtol=1e-3, atol=1e-4, msg=name)
    best = dict.fromkeys(IMPLEMENTATIONS, float("inf"))
    for _ in range(rounds):
        for name, run in IMPLEMENTATIONS.items():
            start = time.perf_counter()
            torch.autograd.grad(run(shape, x).sum(), x)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: shape.tokens / seconds for name, seconds in best.items()}


def row(shape: Shape, rounds: int) -> dict[str, object]:
    speed = measure(shape, rounds)
    lengths = shape.documents
    same = len(set(lengths)) == 1
    return {
        "documents": f"{len(lengths)} x {lengths[0]}" if same else "+".join(map(str, lengths)),
        "heads": shape.heads,
        "d_k": shape.d_k,
        "d_v": shape.d_v,
        **speed,
        "gain_transformers": speed["ours"] / speed["transformers"],
        "gain_naive": speed["ours"] / speed["naive"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, best counts (default 7)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row(shape, options.rounds) for shape in SHAPES]
    print(f"forward + backward, float32, {options.threads} thread(s), torch {torch.__version__}")
    print(Table(COLUMNS, rows).text())


if __name__ == "__main__":
    main()
