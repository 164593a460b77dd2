"""One GatedDeltaNet mixer over a long prompt by key width: our chunk kernels beside fla's.

    python -m benchmarks.prefill [--batch 32] [--tokens 4096] [--widths 64,80,96,112,128]

On a GPU: milliseconds forward, and forward and backward, of one mixer (hidden 2048, 16 heads, d_v
128, bfloat16). The kernels take turns in one run, and the median counts; "gain" is fla's time over
ours at one width, "over widest" that of the last width on fla's kernels over ours. Widths that
fla's blocks of 64 divide have no kernels of ours.

Without a GPU it rehearses: Triton's interpreter runs our kernels on a few tokens, nothing is timed,
and the table has their distance from the same operator in float64.
"""

import argparse
import os
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from launch.drawing.table import Column, Table
from launch.speed.timing import take_turns, timed

HIDDEN, HEADS, VALUES = 2048, 16, 128
OWNERS = ("slimstate", "fla")
TIMES = (
    Column("d_k"),
    Column("pass", align="left"),
    Column("fla", "fla, ms", ",.2f"),
    Column("slimstate", "ours, ms", ",.2f"),
    Column("gain", "gain", ".2f"),
    Column("over", "over widest", ".2f"),
)
DISTANCES = (
    Column("d_k"),
    Column("rule", align="left"),
    Column("output", "output, relative error", ".1e"),
    Column("gradients", "gradients, largest relative error", ".1e"),
)
REHEARSED = (80, 96)
PASSES = ("forward", "forward and backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--widths", default="64,80,96,112,128", help="key widths, widest last")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        # Before triton is imported, which reads it once.
        os.environ["TRITON_INTERPRET"] = "1"
        print("interpreter, no timing")
        print(Table(DISTANCES, [rehearsed(w, g) for w in REHEARSED for g in (True, False)]).text())
        return
    widths = [int(text) for text in options.widths.split(",")]
    rows = [
        row
        for width in widths
        for row in times(width, options.batch, options.tokens, options.repeats)
    ]
    for row in rows:
        widest = next(r["fla"] for r in reversed(rows) if r["pass"] == row["pass"])
        row["over"] = widest / row.get("slimstate", row["fla"])
    print(f"{torch.cuda.get_device_name()}, {options.batch} x {options.tokens:,}, bfloat16")
    print(Table(TIMES, rows).text())


def times(width: int, batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each pass: median milliseconds of each owner's kernels."""
    import flame.register  # noqa: F401

    module, device = mixer(width), torch.device("cuda")
    owners = OWNERS if width % 64 else ("fla",)
    hidden = torch.randn(batch, tokens, HIDDEN, dtype=torch.bfloat16, device=device)

    def timer(owner: str, action: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            os.environ["SLIMSTATE_KERNELS"] = owner
            return timed(action, device)

        return run

    def forward() -> None:
        with torch.no_grad():
            module(hidden)

    def backward() -> None:
        module(hidden)[0].float().sum().backward()
        module.zero_grad()

    rows = []
    for name, action in zip(PASSES, (forward, backward), strict=True):
        seconds = take_turns({owner: timer(owner, action) for owner in owners}, repeats)
        row: dict[str, Any] = {"d_k": width, "pass": name}
        row |= {owner: 1000 * median(values) for owner, values in seconds.items()}
        if "slimstate" in row:
            row["gain"] = row["fla"] / row["slimstate"]
        rows.append(row)
    return rows


def mixer(width: int) -> nn.Module:
    from fla.layers import GatedDeltaNet

    from pruning.adapters.widths import expansion

    module = GatedDeltaNet(
        hidden_size=HIDDEN, head_dim=width, num_heads=HEADS, expand_v=expansion(width, VALUES)
    )
    assert module.head_v_dim == VALUES
    return module.to("cuda", torch.bfloat16)


def rehearsed(width: int, gated: bool) -> dict[str, Any]:
    """Return how far our kernels' output and gradients are from float64, on 70 random tokens."""
    from fla.ops.delta_rule.chunk import ChunkDeltaRuleFunction
    from fla.ops.gated_delta_rule.chunk import ChunkGatedDeltaRuleFunction
    from triton.runtime.autotuner import Autotuner

    import flame.register  # noqa: F401
    from kernels.delta_rule import chunk_delta_rule
    from kernels.gated_delta_rule import chunk_gated_delta_rule

    # No choice of fla's autotuners can be timed here: they take the first.
    Autotuner.do_bench = staticmethod(lambda *args, **kwargs: [0.0] * 3)
    tensors, scale = inputs(width, gated), width**-0.5
    function = ChunkGatedDeltaRuleFunction if gated else ChunkDeltaRuleFunction
    exact = chunk_gated_delta_rule if gated else chunk_delta_rule
    ours, ours_grads = outcome(lambda *x: function.apply(*x, scale, None, False), tensors)
    wide, wide_grads = outcome(exact, [x.double() for x in tensors])
    gradients = zip(ours_grads, wide_grads, strict=True)
    return {
        "d_k": width,
        "rule": "gated" if gated else "plain",
        "output": distance(ours, wide),
        "gradients": max(distance(a, b) for a, b in gradients),
    }


def inputs(width: int, gated: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, d, generator=generator) for d in (width, width, 32))
    q, k = (nn.functional.normalize(x, dim=-1) for x in (q, k))
    g, beta = (torch.randn(1, 70, 2, generator=generator) for _ in range(2))
    g = [nn.functional.logsigmoid(g + 3)] if gated else []
    return [q, k, v, *g, beta.sigmoid()]


def outcome(
    operator: Callable[..., tuple[Tensor, object]], tensors: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = operator(*leaves)[0]
    return out, torch.autograd.grad(out.square().sum(), leaves)


def distance(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact).abs().max() / exact.abs().max()).detach())


if __name__ == "__main__":
    main()
