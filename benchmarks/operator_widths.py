"""Milliseconds of the delta-rule operators that fla's layers call, over widths of the keys.

    python -m benchmarks.operator_widths [--widths 16 32 … 256] [--batches 1 16 … 1024]

After `import flame.register`, so that each call takes the kernel that a model would get;
SLIMSTATE_KERNELS=fla leaves them to fla alone. Two tables: forward, and forward with backward, of
the chunked operators on one sequence; one token of a batch by the recurrent operator. The ratio is
to the dense width of the same run, `--dense`. On a GPU times are between CUDA events, the median of
the rounds in which all widths take their turn.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.drawing.table import Column, Table
from launch.speed.timing import take_turns, timed

OPERATORS = {
    "delta rule": ("fla.ops.delta_rule", "chunk_delta_rule"),
    "gated delta rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "delta rule, a token": ("fla.ops.delta_rule", "fused_recurrent_delta_rule"),
    "gated delta rule, a token": ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule"),
}
COLUMNS = (
    Column("operator", align="left"),
    Column("batch"),
    Column("d_k"),
    Column("forward", "forward, ms", ",.3f"),
    Column("forward_ratio", "÷ dense", ".3f"),
    Column("both", "with backward, ms", ",.3f"),
    Column("both_ratio", "÷ dense", ".3f"),
    Column("failed", "", align="left"),
)


def main() -> None:
    options = parse()
    import flame.register  # noqa: F401

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chunked = [
        row for operator in ("delta rule", "gated delta rule")
        for row in table(operator, 1, options.tokens, options, device, backward=True)
    ]  # fmt: skip
    print(f"Chunked: one sequence of {options.tokens:,} tokens, {options.heads} heads")
    print(Table(COLUMNS, chunked).text(), flush=True)
    recurrent = [
        row for operator in ("delta rule, a token", "gated delta rule, a token")
        for batch in options.batches
        for row in table(operator, batch, 1, options, device, backward=False)
    ]  # fmt: skip
    print("\nRecurrent: one token of each sequence, state in fp32")
    print(Table([c for c in COLUMNS if not c.key.startswith("both")], recurrent).text())
    if options.json:
        options.json.write_text(json.dumps([*chunked, *recurrent], indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[16, 32, 48, 64, 80, 96, 112, 128, 192, 256])
    add("--dense", type=int, default=128, help="width that ratios divide by")
    add("--d-v", type=int, default=128)
    add("--heads", type=int, default=16)
    add("--tokens", type=int, default=32768, help="of the chunked operators")
    add("--batches", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    add("--rounds", type=int, default=7)
    add("--json", type=Path)
    return parser.parse_args()


def table(
    name: str,
    batch: int,
    tokens: int,
    options: argparse.Namespace,
    device: torch.device,
    backward: bool,
) -> list[dict[str, Any]]:
    """Rows of one operator, a row a width."""
    rows = {width: {"operator": name, "batch": batch, "d_k": width} for width in options.widths}
    for what in ("forward", "both")[: 1 + backward]:
        runs = {}
        for width, row in rows.items():
            action = partial(call, name, batch, tokens, width, options, device, what == "both")
            try:
                run = action()
                run()
            except Exception as error:  # noqa: BLE001  (a width that breaks a kernel is a result)
                row["failed"] = f"{what}: {type(error).__name__}: {str(error)[:80]}"
            else:
                runs[str(width)] = partial(timed, run, device)
        for width, seconds in take_turns(runs, options.rounds).items():
            rows[int(width)][what] = 1000 * statistics.median(seconds)
    dense = rows.get(options.dense, {})
    for row in rows.values():
        for what in ("forward", "both"):
            if what in row and what in dense:
                row[f"{what}_ratio"] = row[what] / dense[what]
    return list(rows.values())


def call(
    name: str,
    batch: int,
    tokens: int,
    width: int,
    options: argparse.Namespace,
    device: torch.device,
    backward: bool,
) -> Callable[[], object]:
    """Return what runs the operator once on inputs as a layer makes them."""
    module, function = OPERATORS[name]
    # Looked up after flame.register, which puts other functions in these places.
    operator, is_gated = getattr(import_module(module), function), "gated" in name
    wide = torch.bfloat16 if device.type == "cuda" else torch.float32

    def random(*last: int) -> Tensor:
        return torch.randn(batch, tokens, options.heads, *last, device=device)

    q, k, v = (random(size).to(wide) for size in (width, width, options.d_v))
    x = [q, F.normalize(k, dim=-1), v, random().sigmoid().to(wide)]
    if is_gated:
        x.append(F.logsigmoid(random() + 3))
    x = [tensor.requires_grad_(backward) for tensor in x]
    state = None
    if tokens == 1:
        shape = (batch, options.heads, width, options.d_v)
        state = torch.randn(shape, device=device)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = operator(
                x[0], x[1], x[2], beta=x[3], initial_state=state,
                output_final_state=state is not None, use_qk_l2norm_in_kernel=True,
                **({"g": x[4]} if is_gated else {}),
            )[0]  # fmt: skip
        if backward:
            torch.autograd.grad(out.float().sum(), x)

    return run


if __name__ == "__main__":
    main()
