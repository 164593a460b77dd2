"""`--estimate`: what calibration and repair take, beside DRRQR's calibration of the same data."""

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from flame.checkpoint.foreign import GivenFiles
from flame.checkpoint.reference import read_config
from flame.options import option
from flame.process.distributed import compute_dtype
from flame.recipe import read_tables, sequence_length
from pruning.adapters import adapter_for
from pruning.adapters.interface import Config
from pruning.calibration.data import replayed_tokens
from pruning.cost.counts import Counts
from pruning.cost.work import RATES, Work, measured_rates, rates_of
from pruning.options import SEQ_LEN, DataOptions
from pruning.repair.layer_options import LayerOptions
from pruning.spaces import KINDS, NOUNS, Kind
from pruning.taps import operator_for

BFLOAT16 = 2
"""Bytes of a number where rates are given, which is for GPUs."""


@dataclass(frozen=True)
class EstimateOptions:
    """Printing costs in place of work."""

    estimate: bool = option(
        False,
        "print what calibration and repair take, worked out from config.json, and stop; MODEL may "
        "be the config.json alone",
    )
    rates: str = option(
        "",
        f"with --estimate: what a process does a second, as {RATES} (default: measured here)",
        metavar="A,B,C,D",
    )


@dataclass(frozen=True)
class Part:
    """A row of the table."""

    name: str
    work: Work
    alone: Work = Work()
    """What is not shared by the processes."""

    def seconds(self, rates: Work, ranks: int) -> float:
        """Of wall time, if no process waits for another."""
        return self.work.seconds(rates) / ranks + self.alone.seconds(rates)


def estimate_text(
    model: str,
    given: GivenFiles,
    data: DataOptions,
    options: EstimateOptions,
    ranks: int,
    kinds: tuple[Kind, ...] = KINDS,
    local: LayerOptions | None = None,
) -> str:
    """The table for a model on `ranks` processes, of which `kinds` of channels are pruned.

    Raises:
        UserError: the model cannot be pruned, or the rates cannot be read.
    """
    path = Path(model)
    reference = None if path.is_file() else given.resolve(model)
    config = read_config(path) if reference is None else reference.config
    recipe = data.recipe or (reference and reference.recipe)
    seq_len = data.seq_len or (sequence_length(read_tables(recipe)) if recipe else None) or SEQ_LEN
    rates = rates_of(tuple(options.rates.split(","))) if options.rates else measured(config)
    counts = Counts(config, BFLOAT16 if options.rates else compute_dtype().itemsize)
    found = parts(counts, data, seq_len, kinds, local or LayerOptions())
    whole = next(part for part in found if part.name == "drrqr").seconds(rates, ranks)
    lines = [
        f"{part.name:<44}{part.seconds(rates, ranks):>12,.1f}"
        f"{part.seconds(rates, ranks) / whole:>12.2f}"
        for part in found
    ]
    said = ", ".join(f"{rate:.2g}" for rate in astuple(rates))
    source = "given" if options.rates else "measured here"
    return "\n".join(
        [
            f"{data.sequences} sequences of {seq_len:,} tokens on {ranks} processes, layers "
            f"repeated on {replayed_tokens(data, seq_len):,}",
            f"rates a second, {source}: {said} ({RATES})",
            "",
            f"{'part':<44}{'seconds':>12}{'of drrqr':>12}",
            *lines,
        ]
    )


def measured(config: Config, clock: Callable[[], float] = time.perf_counter) -> Work:
    """Rates of this machine for the model's heads."""
    adapter = adapter_for(config)
    sizes = Counts(config, 0).sizes
    # The calls of a family with a decay are no slower without one.
    operator = operator_for(adapter)

    def run(**call: Any) -> Any:
        if "delta_rule" in operator.__name__ and "gated" not in operator.__name__:
            return operator(**call)
        q = call["q"]
        wide = "kda" in operator.__name__
        shape = q.shape if wide else q.shape[:3]
        return operator(**call, g=torch.full(shape, -0.1, device=q.device, dtype=torch.float32))

    return measured_rates(run, sizes.key, sizes.of_head, clock)


def parts(
    counts: Counts, data: DataOptions, seq_len: int, kinds: tuple[Kind, ...], local: LayerOptions
) -> list[Part]:
    """The table's rows."""
    tokens, replayed = data.sequences * seq_len, replayed_tokens(data, seq_len)
    forward = tokens * counts.forward(seq_len)
    own = {space.kind for space in adapter_for(dict(counts.config)).spaces(dict(counts.config))}
    errors = {kind: replayed * counts.replays(kind) for kind in kinds if kind in own}
    chosen = forward + sum(errors.values(), Work())
    refit = forward + tokens * counts.output_equations()
    train = local.trained_on(data.sequences)
    steps = counts.local_steps(
        local.repair_steps, local.repair_batch, seq_len, data.sequences - train
    )
    layer = Part("", refit + forward, counts.output_fit() + steps)
    return [
        Part("forward passes", forward),
        Part("drrqr", forward + tokens * counts.query_key_grams()),
        Part("taylor", forward + tokens * counts.backward(seq_len)),
        *(Part(f"output-error of {NOUNS[kind]}", forward + w) for kind, w in errors.items()),
        Part("local steps", Work(), steps),
        Part("repair output", refit, counts.output_fit()),
        Part("repair layer, with repair output", layer.work, layer.alone),
        Part("output-error and repair output", chosen + refit, counts.output_fit()),
        Part("output-error and repair layer", chosen + layer.work, layer.alone),
    ]
