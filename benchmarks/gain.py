"""How far pruned models are from the masked dense one, by what is done about the gain.

    python -m benchmarks.gain MODEL [--removed key=0.5 key=0.75 value=0.5 key=0.75,value=0.75]
                                    [--method l1] [--sequences 16]

The masked dense model has zeros in the channels that go. `published` slices it, as arXiv 2602.04852
does; `eps` undoes the gain by the stock config's eps, as `slimstate prune` does, which all norms of
the model share; `stream` multiplies the residual stream as well, by embeddings and the output and
down projections, so that the other norms feel nothing of it: exact, but for the rounding. KL is in
nats a token on the model's held-out text, in float32 and with weights and passes in bfloat16.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import ModelReference, resolve
from flame.errors import UserError, run_stage
from flame.hugging_face.config_file import keeps_documents_apart, vocabulary_size
from flame.model import stock_config
from launch.drawing.table import Column, Table
from launch.evaluation.fidelity import sum_divergences
from launch.evaluation.heldout_text import HeldoutOptions, heldout_text
from pruning.methods import METHODS
from pruning.planning.budgets import Budget
from pruning.planning.choose import choose
from pruning.planning.per_kind import parse_per_kind, parse_ratio
from pruning.planning.plan import Plan, planned_spaces, pruned_config
from pruning.spaces import dropped_positions
from pruning.transform.sliced_source import SlicedSource
from pruning.transform.slices import slices_of

COLUMNS = (
    Column("removed", "removed", align="left"),
    Column("eps", "eps :", ".0f"),
    Column("form", "form", align="left"),
    Column("kl", "KL, float32", ".1e"),
    Column("kl_bf16", "KL, bfloat16", ".1e"),
)
STREAM = ("embeddings.weight", "o_proj.weight", "down_proj.weight")
"""Ends of the names of what adds to the residual stream."""

Tensors = Mapping[str, Tensor]


def main() -> None:
    run_stage(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", help="run folder whose recipe names held-out text")
    removed = ["key=0.5", "key=0.75", "value=0.5", "key=0.75,value=0.75"]
    add("--removed", nargs="+", metavar="KIND=RATIO,…", default=removed)
    add("--method", default="l1", help="one that reads no data")
    add("--sequences", type=int, default=16)
    options = parser.parse_args()
    reference = resolve(options.model)
    if METHODS[options.method].needs:
        raise UserError(f"{options.method} reads data: choose one that does not, such as l1")
    text = heldout_text(reference, HeldoutOptions(max_sequences=options.sequences))
    apart = keeps_documents_apart(reference.config)
    rows = list(text.sequences(vocabulary_size(reference.config), apart))
    table = []
    for words in options.removed:
        ratios = parse_per_kind(words, parse_ratio)
        assert isinstance(ratios, Mapping)
        budget = Budget(ratio=ratios, space=",".join(ratios), multiple_of=1)
        plan = choose(reference.config, reference.source(), METHODS[options.method](), budget)
        table += [{"removed": words, **row} for row in measured(reference, plan, rows)]
    print(Table(COLUMNS, table).text())


def measured(reference: ModelReference, plan: Plan, rows: list[Any]) -> list[dict[str, Any]]:
    """A row of the table for each form of the pruned model."""
    before, after = (c.get("norm_eps", 1e-6) for c in (reference.config, plan.config_after))
    masked = load_model(reference)
    for space in planned_spaces(plan, reference.config):
        for axis in space.axes:
            if axis.role == "projection":
                dropped = dropped_positions(axis, plan.kept[space.name])
                weight = masked.get_parameter(axis.fqn).data
                weight.index_fill_(axis.dim, dropped, 0)
    undone = sliced(reference, plan)
    config = pruned_config(reference.config, plan.kept)
    forms = {
        "published": (config, sliced(reference, replace(plan, undo_gain=False))),
        "eps": (plan.config_after, undone),
        "stream": (plan.config_after, enlarged(undone, plan.config_after, after / before)),
        "masked": (reference.config, dict(masked.state_dict())),
    }
    found = []
    for form, (of_form, tensors) in forms.items():
        kl = []
        for dtype in (torch.float32, torch.bfloat16):
            total, _, tokens, _ = sum_divergences(built(of_form, tensors, dtype), masked, rows)
            kl.append(total / tokens)
        ratio = of_form.get("norm_eps", 1e-6) / before
        found.append({"form": form, "eps": ratio, "kl": kl[0], "kl_bf16": kl[1]})
    return found


def sliced(reference: ModelReference, plan: Plan) -> dict[str, Tensor]:
    """The tensors of the pruned model."""
    source = SlicedSource(reference.source(), slices_of(plan, reference.config))
    return {name: source.read(name) for name in source.names()}


def enlarged(tensors: Tensors, config: Mapping[str, Any], ratio: float) -> dict[str, Tensor]:
    """The same model with a residual stream sqrt(`ratio`) times as large."""
    factor = ratio**0.5
    found = {n: t * factor if n.endswith(STREAM) else t for n, t in tensors.items()}
    if config.get("tie_word_embeddings"):
        found["model.norm.weight"] = found["model.norm.weight"] / factor
        found["lm_head.weight"] = found["model.embeddings.weight"]
    return found


def built(config: dict[str, Any], tensors: Tensors, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(stock_config(config))
    model.load_state_dict(tensors, strict=False)
    return model.to(dtype).eval()


if __name__ == "__main__":
    main()
