"""Microseconds of a layer's decode step between its projections: our launch beside fla's.

    python -m benchmarks.decode_step [--widths 32 … 256] [--batches 1 … 1024] [--rules gated kda]

Ours is one launch (`kernels.decode_step`); fla's are those of its layer: three convolutions, the
recurrent operator, the output norm. Both are captured in CUDA graphs of several steps, on inputs
and memory of their own, and take turns; medians count. `copy` is the time of a copy on the device
that reads and writes as many bytes as our step must, over the time of our step. fla's step keeps
its state in float32 whatever it starts from. Without a GPU this is a rehearsal under Triton's
interpreter at tiny sizes: both are run and compared, and nothing is timed.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Before triton is imported: kernels are made for the interpreter or for a GPU.
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor, nn  # noqa: E402

from launch.drawing.table import Column, Table  # noqa: E402
from launch.speed.timing import take_turns, timed  # noqa: E402

COLUMNS = (
    Column("rule", align="left"),
    Column("batch"),
    Column("d_k"),
    Column("state", align="left"),
    Column("ours", "ours, µs", ",.1f"),
    Column("fla", "fla, µs", ",.1f"),
    Column("ratio", "fla ÷ ours", ".2f"),
    Column("copy", "copy ÷ ours", ".0%"),
    Column("note", "", align="left"),
)
STEPS_A_GRAPH = 10
Launches = Callable[[], Tensor]


def main() -> None:
    options = parse()
    import flame.register  # noqa: F401

    measure = speeds if torch.cuda.is_available() else rehearsal
    rows = []
    for rule in options.rules:
        for width in options.widths:
            layer = layer_of(rule, width, options)
            for batch in options.batches:
                for state in options.states:
                    row = {"rule": rule, "batch": batch, "d_k": width, "state": state}
                    rows.append({**row, **measure(layer, batch, state, options.rounds)})
    print(f"{options.heads} heads, {options.d_v} value channels")
    print(Table(COLUMNS, rows).text())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    rules = ["delta", "gated", "kda"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    widths = [32, 48, 64, 80, 96, 112, 128, 192, 256]
    add("--widths", type=int, nargs="+", default=widths if gpu else [16, 24])
    add("--batches", type=int, nargs="+", default=[1, 16, 64, 256, 1024] if gpu else [1, 2])
    add("--rules", nargs="+", default=["gated"] if gpu else rules, choices=rules)
    add("--states", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    add("--d-v", type=int, default=128 if gpu else 16)
    add("--heads", type=int, default=16 if gpu else 1)
    add("--rounds", type=int, default=7)
    add("--json", type=Path)
    return parser.parse_args()


def layer_of(rule: str, width: int, options: argparse.Namespace) -> nn.Module:
    """A layer of fla with random weights; on a GPU there, in bfloat16."""
    from fla.layers import DeltaNet, GatedDeltaNet, KimiDeltaAttention

    torch.manual_seed(0)
    heads = options.heads
    shared: dict[str, Any] = {"hidden_size": 64 * heads, "num_heads": heads, "layer_idx": 0}
    if rule == "delta":
        shares = {"expand_k": width / 64, "expand_v": options.d_v / 64}
        layer: nn.Module = DeltaNet(**shared, **shares, use_gate=True)
    else:
        made = GatedDeltaNet if rule == "gated" else KimiDeltaAttention
        layer = made(**shared, head_dim=width, expand_v=options.d_v / width)
    layer = layer.eval().requires_grad_(False)
    return layer.to("cuda", torch.bfloat16) if torch.cuda.is_available() else layer


def step_of(layer: Any, batch: int, state_dtype: str) -> Any:
    """A token of a batch, in the middle of its sequences."""
    from fla.layers import DeltaNet

    from kernels.decode_step.fla_layers import layer_step

    x = layer.o_proj.weight.new_empty(batch, layer.hidden_size).normal_()
    shape = [layer.head_v_dim, layer.head_k_dim]
    if isinstance(layer, DeltaNet):
        shape.reverse()
    heads = getattr(layer, "num_v_heads", layer.num_heads)
    state = x.new_empty(batch, heads, *shape, dtype=getattr(torch, state_dtype)).normal_()
    convolutions = (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)
    windows = [x.new_empty(batch, c.hidden_size, c.kernel_size[0]).normal_() for c in convolutions]
    return layer_step(layer, x, state, windows, None)


def by_fla(layer: Any, step: Any) -> Tensor:
    """What the forward of fla's layer does with the same inputs and windows."""
    from kernels.decode_step.fla_layers import OPERATORS

    modules = (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)
    widths = (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim)
    q, k, v = (
        module(x[:, None], cache=c.window, output_final_state=True)[0].unflatten(-1, (-1, width))
        for module, x, c, width in zip(
            modules, (step.q, step.k, step.v), step.convolutions, widths, strict=True
        )
    )
    operator = getattr(sys.modules[type(layer).__module__], OPERATORS[type(layer)])
    options = {"initial_state": step.state, "output_final_state": True}
    beta = step.beta[:, None]
    if step.decay is None:
        beta = beta.sigmoid()
    else:
        g = step.decay.input[:, None]
        options |= {
            "g": g.unflatten(-1, (-1, layer.head_k_dim)) if step.channel_decay else g,
            "A_log": step.decay.a_log, "dt_bias": step.decay.dt_bias, "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True, "state_v_first": True,
        }  # fmt: skip
    o, _ = operator(q=q, k=k, v=v, beta=beta, use_qk_l2norm_in_kernel=True, **options)
    return layer.o_norm(o, step.output.gate[:, None].view_as(o)).flatten(1)


@torch.no_grad()
def rehearsal(layer: nn.Module, batch: int, state: str, rounds: int) -> dict[str, Any]:
    """Both on the same step; AssertionError if they give something else."""
    from kernels.decode_step import decode_step

    found = []
    for run in (decode_step, partial(by_fla, layer)):
        torch.manual_seed(1)
        found.append(run(step_of(layer, batch, state)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    return {"note": "interpreter, no timing"}


@torch.no_grad()
def speeds(layer: nn.Module, batch: int, state: str, rounds: int) -> dict[str, Any]:
    from kernels.decode_step import decode_step

    step, theirs = step_of(layer, batch, state), step_of(layer, batch, state)
    source = torch.empty(step.bytes_moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    runs: dict[str, Launches] = {
        "ours": lambda: decode_step(step),
        "fla": lambda: by_fla(layer, theirs),
        "copy": lambda: target.copy_(source),
    }
    device = source.device
    graphs = {name: partial(timed, captured(run).replay, device) for name, run in runs.items()}
    found = {
        name: 1e6 * statistics.median(seconds) / STEPS_A_GRAPH
        for name, seconds in take_turns(graphs, rounds).items()
    }
    copy = found["copy"] / found["ours"]
    return {"ours": found["ours"], "fla": found["fla"], "ratio": found["fla"] / found["ours"],
            "copy": copy}  # fmt: skip


def captured(run: Launches) -> torch.cuda.CUDAGraph:
    """A graph of `STEPS_A_GRAPH` runs, captured after runs that compile and tune."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS_A_GRAPH):
            run()
    return graph


if __name__ == "__main__":
    main()
