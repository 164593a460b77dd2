"""Tokens/s of the delta-rule operators on a CPU, beside transformers' and fla's.

    python -m benchmarks.cpu_operators [--threads 1] [--rounds 7] [--only gated kda product]
    python -m benchmarks.cpu_operators --only grid decode [--clock cpu]

Beside transformers' pure-PyTorch operators (it has the gated delta rule only) and, but for the
grid and decoding, fla's naive token loops, on the same shapes; the delta product takes two steps a
token. A measurement is one forward and backward on random float32 input, or for `decode` one token
of every sequence with its state. In every round each implementation runs once, in turn, so that
they meet the same load; the best round of each counts. Packed documents, which only ours takes, are
given to the others one by one. With one thread `--clock cpu` takes the process's CPU time, which
other programs disturb less.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.drawing.table import Column, Table

Operator = Callable[..., tuple[Tensor, Tensor | None]]
STEPS = {"gated": 1, "kda": 1, "product": 2, "grid": 1, "decode": 1}
"""What `--only` names, with the delta-rule steps of a token; the last two are the gated rule on
every width, length and batch, and one token at a time."""
DECODE_ROUNDS = 20
"""Tokens are so short that they are measured this many times more often."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Shape:
    documents: tuple[int, ...]
    heads: int
    d_k: int
    d_v: int
    operator: str = "gated"
    batch: int = 1

    @property
    def tokens(self) -> int:
        return self.batch * sum(self.documents)

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
    *(
        Shape((length,), 4, d_k, d_v, "grid", batch)
        for d_k, d_v in ((32, 64), (64, 128), (96, 96), (128, 128))
        for batch, length in ((1, 256), (1, 1024), (1, 4096), (8, 256), (8, 1024), (8, 4096))
    ),
    *(
        Shape((1,), 4, d_k, d_v, "decode", batch)
        for d_k, d_v in ((32, 64), (64, 128), (128, 128))
        for batch in (1, 8, 64, 256)
    ),
)

COLUMNS = (
    Column("operator", align="left"),
    Column("batch"),
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
    """Return q, k, v, g, beta `[B, T, H, ...]` as a layer makes them; leaves with gradients.

    k, v and beta have `steps` rows a token; g is per key channel for KDA. For decoding the states
    `[B, H, K, V]` are added.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, steps: int = 1) -> Tensor:
        length = steps * sum(shape.documents)
        return torch.randn(shape.batch, length, shape.heads, *size, generator=generator)

    q, k = (F.normalize(normal(shape.d_k, steps=n), dim=-1) for n in (1, shape.steps))
    v, beta = normal(shape.d_v, steps=shape.steps), normal(steps=shape.steps).sigmoid()
    g = F.logsigmoid(normal(*[shape.d_k] * (shape.operator == "kda")) + 3)
    x = [q, k, v, g, beta]
    if shape.operator == "decode":
        size = (shape.batch, shape.heads, shape.d_k, shape.d_v)
        x.append(torch.randn(size, generator=generator))
    return [tensor.requires_grad_() for tensor in x]


def ours(shape: Shape, x: list[Tensor]) -> Tensor:
    from kernels.gated_delta_product import chunk_gated_delta_product
    from kernels.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from kernels.kda import chunk_kda

    if shape.operator == "decode":
        return decoded(x, fused_recurrent_gated_delta_rule)
    q, k, v, g, beta = x
    if shape.batch > 1:
        return chunk_gated_delta_rule(*x)[0]
    bounds = torch.tensor((0, *shape.documents)).cumsum(0)
    if shape.operator == "product":
        steps = shape.steps
        return chunk_gated_delta_product(q, k, v, g, beta, steps, cu_seqlens=bounds)[0]
    operator = chunk_kda if shape.operator == "kda" else chunk_gated_delta_rule
    return operator(q, k, v, g, beta, cu_seqlens=bounds)[0]


def transformers_fallback(shape: Shape, x: list[Tensor]) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next

    kind = "recurrent" if shape.operator == "decode" else "chunk"
    dispatching = getattr(modeling_qwen3_next, f"torch_{kind}_gated_delta_rule")
    operator = getattr(dispatching, "__wrapped__", dispatching)
    if shape.operator == "decode":
        return decoded(x, operator)
    return one_by_one(shape, x, lambda q, k, v, g, beta: operator(q, k, v, g=g, beta=beta))


@torch.no_grad()
def decoded(x: list[Tensor], operator: Operator) -> Tensor:
    """Return the outputs of one token of every sequence; the next states are made too."""
    q, k, v, g, beta, state = x
    flags = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return operator(q, k, v, g=g, beta=beta, initial_state=state, **flags)[0]


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
    length = sum(shape.documents)
    rows = [[d * (tensor.shape[1] // length) for d in shape.documents] for tensor in x]
    parts = zip(*(t.split(cut, 1) for t, cut in zip(x, rows, strict=True)), strict=True)
    return torch.cat([operator(*part)[0] for part in parts], 1)


IMPLEMENTATIONS = {"ours": ours, "transformers": transformers_fallback, "naive": fla_naive}


def measure(shape: Shape, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return tokens/s of each implementation, after checking that they agree."""
    x, implementations = inputs(shape), dict(IMPLEMENTATIONS)
    if shape.operator in ("kda", "product"):
        del implementations["transformers"]
    if shape.operator in ("grid", "decode"):
        del implementations["naive"]
    outputs = {name: run(shape, x) for name, run in implementations.items()}
    *_, expected = outputs.values()
    for name, out in outputs.items():
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4, msg=name)
    best = dict.fromkeys(implementations, float("inf"))
    for _ in range(rounds if shape.operator != "decode" else DECODE_ROUNDS * rounds):
        for name, run in implementations.items():
            start = clock()
            out = run(shape, x)
            if out.requires_grad:
                torch.autograd.grad(out.sum(), x)
            best[name] = min(best[name], clock() - start)
    return {name: shape.tokens / seconds for name, seconds in best.items()}


def row(shape: Shape, rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    speed = measure(shape, rounds, clock)
    lengths = shape.documents
    same = len(set(lengths)) == 1
    gains = {f"gain_{name}": speed["ours"] / other for name, other in speed.items()}
    return {
        "operator": shape.operator,
        "batch": shape.batch,
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
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="default wall")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu adds up the threads' time: use it with --threads 1")
    torch.set_num_threads(options.threads)
    shapes = [shape for shape in SHAPES if shape.operator in options.only]
    rows = [row(shape, options.rounds, CLOCKS[options.clock]) for shape in shapes]
    print(
        f"forward + backward, float32, {options.threads} thread(s), {options.clock} time, "
        f"torch {torch.__version__}, load of the machine {os.getloadavg()[0]:.1f}"
    )
    print(Table(COLUMNS, rows).text())


if __name__ == "__main__":
    main()
