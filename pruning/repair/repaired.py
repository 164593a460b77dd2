"""A plan with refitted output projections, made of the plan and the sums of its pruned layers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from flame.checkpoint.source import TensorSource
from flame.errors import UserError, first_line
from pruning.adapters import adapter_for
from pruning.planning.new_tensors import Later
from pruning.planning.plan import Plan
from pruning.repair.output_fit import RIDGE, fitted_projection
from pruning.spaces import Space, output_axis
from pruning.statistics import OutputEquations, Statistic
from pruning.transform.sliced_source import SlicedSource
from pruning.transform.slices import slices_of

Repair = Literal["none", "output", "layer"]

REPAIR_HELP = (
    "output: refit the output projections, so that pruned layers give what the dense ones did; "
    "layer: then train each pruned layer by itself to the same end"
)


def repaired(
    plan: Plan,
    source: TensorSource,
    sums: Mapping[str, Mapping[type[Statistic], Statistic]],
    calibration: dict[str, Any],
) -> Plan:
    """`plan` with output projections fitted to the dense layers' outputs. One process does it.

    A layer is fitted when its projection is written, so memory holds the sums and projection of one
    layer; a layer whose sums have no answer raises UserError then, and is named.

    Args:
        plan: a plan whose own new tensors, if it has any, are in it.
        source: the dense model's tensors.
        sums: by head space, those of the plan's pruned layers.
        calibration: what the plan records of the data behind them.
    """
    slices = slices_of(plan, plan.config_before)
    sliced = SlicedSource(source, slices)

    def fit(space: Space, name: str) -> Tensor:
        of_layer = sums[space.name][OutputEquations]
        assert isinstance(of_layer, OutputEquations)
        kept = slices[name][0].kept if name in slices else torch.arange(len(of_layer.gram))
        try:
            return fitted_projection(
                source.read(name).double(),
                sliced.read(name).double(),
                of_layer.gram.cpu()[kept][:, kept],
                of_layer.cross.cpu()[:, kept],
            )
        except ValueError as error:
            raise UserError(f"repair of layer {space.layer}: {first_line(error)}") from error

    fitted: dict[str, Later] = {}
    for space in layers_of(plan.config_before):
        name = output_axis(space).fqn
        shape = sliced.info(name).shape
        fitted[name] = Later(shape, torch.float64, partial(fit, space, name))
    return replace(
        plan,
        repair={"kind": "output", "ridge": RIDGE, "calibration": calibration},
        notes=(*plan.notes, _note(len(fitted))),
        new_tensors={**plan.new_tensors, **fitted},
    )


def layers_of(config: dict[str, Any]) -> list[Space]:
    """The head spaces of a model, one a layer: for these the sums are made."""
    return [space for space in adapter_for(config).spaces(config) if space.kind == "head"]


def choice_mark(plan: Plan) -> str:
    """What tells the pruned layers of two plans of one model apart, as a hexadecimal number."""
    content = {
        "fingerprint": plan.fingerprint,
        "kept": {name: [row.tolist() for row in rows] for name, rows in plan.kept.items()},
        "method": [plan.method, plan.options],
        "pad": plan.pad,
        "undo_gain": plan.undo_gain,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _note(layers: int) -> str:
    return (
        f"repair: the output projections of {layers} layers are fitted anew, so their optimizer "
        "moments begin anew too"
    )
