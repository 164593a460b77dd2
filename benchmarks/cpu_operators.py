"""Training tokens/s of the delta-rule operators on a CPU, beside transformers' and fla's.

    python -m benchmarks.cpu_operators [--threads 1] [--rounds 7] [--only gated kda product]

Beside transformers' pure-PyTorch chunks (it has the gated delta rule only) and fla's naive token
loops, on the same shapes; the delta product takes two steps a token. A measurement is one forward
and backward on random float32 input. In every round each implementation runs once, in turn, so
that they meet the same load; the best round of each counts. Packed documents, which only ours
takes, are given to the others one by one.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.drawing.table import Column, Table

Operator = Callable[..., tuple[Tensor, Tensor | None]]
STEPS = {"gated": 1, "kda": 1, "product": 2}
"""The operators that `--only` names, with the delta-rule steps of a token."""


@dataclass(frozen=True)
class Shape:
    documents: tuple[int, ...]
    heads: int
    d_k: int
    d_v: int
    operator: str = "gated"

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    @property
    def steps(self) -> int:
        return STEPS[self.operator]


SHAPES = (
    Shape((1024,), 4, 32, 64),
    Shape((100, 250, 1, 249, 300, 124), 4, 32, 64),
    Shape((32,) * 32, 4, 32, 64),
    Shape((1024,), 4, 64, 128),
    Shape((512,), 4, 128, 128),
    Shape((1024,), 4, 32, 64, "kda"),
    Shape((100, 250, 1, 249, 300, 124), 4, 32, 64, "kda"),
    Shape((512,), 4, 128, 128, "kda"),
    Shape((1024,), 4, 32, 64, "product"),
    Shape((100, 250, 1, 249, 300, 124), 4, 32, 64, "product"),
    Shape((512,), 4, 128, 128, "product"),
)

COLUMNS = (
    Column("operator", align="left"),
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
    """Return q, k, v, g, beta `[1, T, H, ...]` as a layer makes them; leaves with gradients.

    k, v and beta have `steps` rows a token; g is per key channel for KDA.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, steps: int = 1) -> Tensor:
        return torch.randn(1, steps * shape.tokens, shape.heads, *size, generator=generator)

    q, k = (F.normalize(normal(shape.d_k, steps=n), dim=-1) for n in (1, shape.steps))
    v, beta = normal(shape.d_v, steps=shape.steps), normal(steps=shape.steps).sigmoid()
    g = F.logsigmoid(normal(*[shape.d_k] * (shape.operator == "kda")) + 3)
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


def ours(shape: Shape, x: list[Tensor]) -> Tensor:
    from kernels.gated_delta_product import chunk_gated_delta_product
    from kernels.gated_delta_rule import chunk_gated_delta_rule
    from kernels.kda import chunk_kda

    q, k, v, g, beta = x
    bounds = torch.tensor((0, *shape.documents)).cumsum(0)
    if shape.operator == "product":
        steps = shape.steps
        return chunk_gated_delta_product(q, k, v, g, beta, steps, cu_seqlens=bounds)[0]
    operator = chunk_kda if shape.operator == "kda" else chunk_gated_delta_rule
    return operator(q, k, v, g, beta, cu_seqlens=bounds)[0]


def transformers_fallback(shape: Shape, x: list[Tensor]) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next

    dispatching = modeling_qwen3_next.torch_chunk_gated_delta_rule
    operator = getattr(dispatching, "__wrapped__", dispatching)
    return one_by_one(shape, x, lambda q, k, v, g, beta: operator(q, k, v, g=g, beta=beta))


def fla_naive(shape: Shape, x: list[Tensor]) -> Tensor:
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.kda.naive import naive_recurrent_kda

    def product(*x: Tensor) -> tuple[Tensor, Tensor]:
        scale, steps = shape.d_k**-0.5, shape.steps
        return naive_recurrent_gated_delta_product(*x, scale, num_householder=steps)

    def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return naive_recurrent_gated_delta_rule(q, k, v, beta, g)

    loops = {"gated": gated, "kda": naive_recurrent_kda, "product": product}
    return one_by_one(shape, x, loops[shape.operator])


def one_by_one(shape: Shape, x: list[Tensor], operator: Operator) -> Tensor:
    rows = [[d * (tensor.shape[1] // shape.tokens) for d in shape.documents] for tensor in x]
    parts = zip(*(t.split(cut, 1) for t, cut in zip(x, rows, strict=True)), strict=True)
    return torch.cat([operator(*part)[0] for part in parts], 1)


IMPLEMENTATIONS = {"ours": ours, "transformers": transformers_fallback, "naive": fla_naive}


def measure(shape: Shape, rounds: int) -> dict[str, float]:
    """Return tokens/s of each implementation, after checking that they agree."""
    x, implementations = inputs(shape), dict(IMPLEMENTATIONS)
    if shape.operator != "gated":
        del implementations["transformers"]
    outputs = {name: run(shape, x) for name, run in implementations.items()}
    for name, out in outputs.items():
        torch.testing.assert_close(out, outputs["naive"], rtol=1e-3, atol=1e-4, msg=name)
    best = dict.fromkeys(implementations, float("inf"))
    for _ in range(rounds):
        for name, run in implementations.items():
            start = time.perf_counter()
            torch.autograd.grad(run(shape, x).sum(), x)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: shape.tokens / seconds for name, seconds in best.items()}


def row(shape: Shape, rounds: int) -> dict[str, object]:
    speed = measure(shape, rounds)
    lengths = shape.documents
    same = len(set(lengths)) == 1
    gains = {f"gain_{name}": speed["ours"] / other for name, other in speed.items()}
    return {
        "operator": shape.operator,
        "documents": f"{len(lengths)} x {lengths[0]}" if same else "+".join(map(str, lengths)),
        "heads": shape.heads,
        "d_k": shape.d_k,
        "d_v": shape.d_v,
        **speed,
        **gains,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, best counts (default 7)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="operators")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row(s, options.rounds) for s in SHAPES if s.operator in options.only]
    print(f"forward + backward, float32, {options.threads} thread(s), torch {torch.__version__}")
    print(Table(COLUMNS, rows).text())


if __name__ == "__main__":
    main()
