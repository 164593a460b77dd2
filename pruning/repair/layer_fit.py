"""`--repair layer`: the pruned layers of a plan, each trained on the dense model's hidden states.

The dense model runs once over the calibration data. What its token mixers take and give stays with
the process that ran the sequence, and the layers are fitted one after another by all processes
together, each of which holds the layer whole. Only mixers that the plan prunes take part.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from flame.checkpoint.load import build_sharded
from flame.checkpoint.reference import ModelReference
from flame.errors import UserError
from flame.process.dealing import Turn, turns
from flame.process.distributed import (
    compute_dtype,
    data_parallel_mesh,
    rank,
    world_size,
)
from flame.process.peers import Peers, on_first
from flame.process.progress import progress
from pruning.adapters import adapter_for
from pruning.calibration.data import CalibrationData
from pruning.calibration.passes import run_batch
from pruning.mixers import find_mixers
from pruning.planning.plan import Plan, planned_spaces
from pruning.repair.finished_layers import FinishedLayers, FittedLayer
from pruning.repair.layer_calls import LayerCall, LayerCalls, calls_tapped, layer_calls
from pruning.repair.layer_options import LayerOptions
from pruning.repair.local_steps import Outcome, Steps, fit
from pruning.repair.pruned_mixers import whole_mixers
from pruning.repair.repaired import choice_mark

Row = tuple[dict[str, Tensor], Tensor]
GetCall = Callable[[int], LayerCall | None]


def with_fitted_layers(
    reference: ModelReference,
    plan: Plan,
    data: CalibrationData,
    options: LayerOptions,
    dtype: torch.dtype | None = None,
) -> Plan:
    """`plan`, whose output projections are refitted, with the pruned layers trained. Collective.

    The first process has the layers' new tensors, in memory unless the options name a folder.

    Args:
        reference: the dense model.
        plan: the same on every process, with its new tensors.
        data: what the layers are trained on, and a part that decides what is kept.
        options: how.
        dtype: of the computation; that of calibrations if None.

    Raises:
        UserError: on every process, if a hidden state is not finite, the data is too short, the
            disk is full, or the folder of finished layers is another repair's.
    """
    began, peers = time.perf_counter(), Peers()
    folder, layers, how = options.repair_folder, pruned_layers(plan), _steps(options, data)
    finished = None if folder is None else FinishedLayers(folder, _mark(plan, data, options))
    fitted = peers.agree(lambda: _found(finished, layers))
    left = [layer for layer in layers if layer not in fitted]
    dtype = dtype or compute_dtype()
    with layer_calls(options.bound, folder) as calls:
        if left:
            collect_calls(reference, left, data, calls, dtype)
        collected = time.perf_counter() - began
        mixers = whole_mixers(reference, plan, left, dtype)
        for layer, name, mixer in progress(mixers, "repair", len(left)):
            outcome = fit(mixer, partial(calls.get, layer), how)
            calls.drop(layer)
            _say(layer, outcome)
            keep = partial(_kept, layer, outcome, _tensors(name, mixer, outcome), finished)
            fitted[layer] = on_first(keep) or FittedLayer(outcome, {})
    if rank() == 0:
        seconds = time.perf_counter() - began
        print(
            f"repair: {len(left)} layers in {seconds:.0f} s, {collected:.0f} s of them for the "
            f"dense model's states, {calls.written / 2**30:.2f} GiB of which went to disk",
            flush=True,
        )
    return _with(plan, fitted, options)


def _found(finished: FinishedLayers | None, layers: list[int]) -> dict[int, FittedLayer]:
    """The layers that an earlier run of this repair has finished."""
    found = {} if finished is None else {layer: finished.load(layer) for layer in layers}
    return {layer: fitted for layer, fitted in found.items() if fitted is not None}


def pruned_layers(plan: Plan) -> list[int]:
    """The layers in which `plan` drops a channel or a head."""
    spaces = planned_spaces(plan, plan.config_before)
    pruned = {s.layer for s in spaces if any(len(k) < s.head_dim for k in plan.kept[s.name])}
    return sorted(pruned)


def collect_calls(
    reference: ModelReference,
    layers: Sequence[int],
    data: CalibrationData,
    calls: LayerCalls,
    dtype: torch.dtype,
) -> None:
    """Put the dense layers' calls on this process's sequences into `calls`. Collective."""
    peers = Peers()
    model = build_sharded(reference, data_parallel_mesh(), dtype)
    found = find_mixers(model, adapter_for(reference.config))
    loader = data.loader(rank(), world_size())
    rows, of_round = iter(loader), dict[int, LayerCall]()
    every = turns(range(data.sequences))
    try:
        with calls_tapped({layer: found[layer] for layer in layers}, of_round.__setitem__):
            for turn in progress(every, "layers' states", -(-data.sequences // world_size())):
                row = peers.agree(partial(_next, rows, data) if turn.counts else lambda: None)
                run_batch(model, row, None)
                peers.agree(partial(_keep, calls, turn, of_round))
    finally:
        loader.close()


def _next(rows: Iterator[Row], data: CalibrationData) -> Row:
    row = next(rows, None)
    if row is None:
        raise UserError(data.too_short())
    return row


def _keep(calls: LayerCalls, turn: Turn[int], of_round: dict[int, LayerCall]) -> None:
    """Keep what the layers took and gave in a round, if it ran a sequence of this process."""
    for layer, call in of_round.items() if turn.counts else ():
        if not bool(call.output.isfinite().all()):
            raise UserError(
                f"layer {layer}, calibration sequence {turn.item + 1}: the token mixer's output "
                "holds a NaN or an infinity: check the model's weights and the precision"
            )
        calls.put(layer, turn.item, call)


def _tensors(name: str, mixer: nn.Module, outcome: Outcome) -> dict[str, Tensor]:
    """The layer's new tensors on the first process; none if no step helped."""
    if outcome.step == 0 or rank() > 0:
        return {}
    return {f"{name}.{key}": x.detach().cpu().clone() for key, x in mixer.named_parameters()}


def _kept(
    layer: int, outcome: Outcome, tensors: dict[str, Tensor], finished: FinishedLayers | None
) -> FittedLayer:
    """The layer, in the folder if there is one, else in memory."""
    if finished is None:
        return FittedLayer(outcome, tensors)
    finished.save(layer, outcome, tensors)
    return finished.load(layer) or FittedLayer(outcome, tensors)


def _steps(options: LayerOptions, data: CalibrationData) -> Steps:
    return Steps(
        steps=options.repair_steps,
        lr=options.repair_lr,
        batch=options.repair_batch,
        train=options.trained_on(data.sequences),
        sequences=data.sequences,
        shards=data.config.virtual_shards,
        seed=data.config.seed,
    )


def _mark(plan: Plan, data: CalibrationData, options: LayerOptions) -> str:
    """What tells this repair from others: model and choice, data, and options that matter."""
    sizes = [data.seq_len, data.sequences, data.config.seed]
    content = [choice_mark(plan), data.record(), sizes, options.record()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _say(layer: int, outcome: Outcome) -> None:
    if rank() == 0:
        kept = f"after {outcome.step} steps" if outcome.step else "no step helped"
        print(
            f"repair: layer {layer}: error on held-out sequences {outcome.before:.5f} -> "
            f"{outcome.after:.5f} of the output's squares ({kept})",
            flush=True,
        )


def _with(plan: Plan, fitted: dict[int, FittedLayer], options: LayerOptions) -> Plan:
    assert plan.repair is not None
    new = {name: x for layer in fitted.values() for name, x in layer.tensors.items()}
    helped = [layer for layer, of_layer in sorted(fitted.items()) if of_layer.outcome.step]
    note = (
        f"repair: local steps lower the held-out error of {len(helped)} of {len(fitted)} layers: "
        "all tensors of their token mixers are new, so their optimizer moments begin anew too"
    )
    return replace(
        plan,
        repair={**plan.repair, "kind": "layer", **options.record(), "layers": helped},
        notes=(*plan.notes, note),
        new_tensors={**plan.new_tensors, **new},
    )
