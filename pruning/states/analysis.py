"""State-rank analysis: a model reads texts under FSDP2, and the rank of its states is measured.

The delta-rule calls are tapped; from each, the states at the chosen times are made by the same
operator, segment by segment, measured and dropped. Memory per layer is one batch of states.
Sequences are dealt to the ranks in turn, each a batch of its own, so that figures do not depend on
the number of processes. On a CPU the states are made in float64 from the activations of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from flame.checkpoint.load import build_sharded
from flame.checkpoint.reference import ModelReference
from flame.errors import UserError
from flame.models.widths import LayerWidths
from flame.process.dealing import turns
from flame.process.distributed import (
    compute_dtype,
    data_parallel_mesh,
    gather_objects,
    local_device,
    world_size,
)
from flame.process.peers import Peers
from flame.process.progress import progress
from pruning.adapters import ADAPTERS, PRUNED, Adapter
from pruning.op_call import OpCall
from pruning.spaces import Space
from pruning.state_rank import (
    EPSILON,
    RankMeasures,
    measure,
    segment_means,
    singular_values,
)
from pruning.states.rollout import Operator, states_after
from pruning.taps import operator_for, tap_ops

MEASURES = tuple(f.name for f in fields(RankMeasures))
METRICS = (*MEASURES, "decay", "beta")
"""What is recorded of a head at a time; decay and beta are means since the time before."""


@dataclass(frozen=True)
class Analysis:
    """Figures of the states of one model over some sequences."""

    layers: list[int]
    """The layers with a recurrent state."""
    times: list[int]
    """Numbers of tokens read."""
    values: dict[str, Float[Tensor, "S L H n"]]
    """By metric, for sequences, layers, heads and times; float64 on the CPU."""
    spectra: list[Float[Tensor, "S H d"]] = field(default_factory=list)
    """Singular values after the last time, by layer."""

    def mean(self, metric: str, time: int = -1) -> Float[Tensor, "L H"]:
        """`metric` at the `time`-th of `times`, the mean over sequences."""
        return self.values[metric][..., time].mean(0)


def linear_spaces(config: dict) -> tuple[Adapter, list[Space]]:
    """The adapter of a model and one key space for each layer with a recurrent state.

    A model whose heads differ in width has no spaces.

    Raises:
        UserError: the model has no such layer, is of a family that has no adapter, or its layers
            differ in their number of heads.
    """
    family = config.get("model_type")
    if family not in ADAPTERS:
        raise UserError(
            f"{family} is no family with linear-attention layers that this can analyse: "
            f"it knows {', '.join(sorted(ADAPTERS))}"
        )
    if family in PRUNED:
        _check_heads(PRUNED[family].widths(config))
        return PRUNED[family], []
    adapter = ADAPTERS[family]
    spaces = [space for space in adapter.spaces(config) if space.kind == "key"]
    if not spaces:
        raise UserError(
            "the model has no linear-attention layer: config.json's attn names every layer"
        )
    return adapter, spaces


def _check_heads(widths: Mapping[int, LayerWidths]) -> None:
    counts = sorted({layer.value_heads for layer in widths.values()})
    if len(counts) > 1:
        raise UserError(
            f"the model's layers have {counts[0]} to {counts[-1]} heads, and heads are compared "
            "between layers: analyse the dense model, or one with as many heads in each layer"
        )


def analyse_states(
    reference: ModelReference,
    rows: Sequence[Int[Tensor, "1 T"]],
    times: Sequence[int],
    epsilon: float = EPSILON,
) -> Analysis:
    """Measure the states of a model while it reads `rows`. Collective; the same on every rank.

    Args:
        reference: the model.
        rows: texts as token ids, each read by itself from an empty state; the same on every rank.
        times: increasing numbers of tokens, at most T.
        epsilon: of the threshold rank.

    Raises:
        UserError: on every rank: the model has no linear-attention layer, or a state is not finite
            (layer, head and time are named).
    """
    adapter, _ = linear_spaces(reference.config)
    model = build_sharded(reference, data_parallel_mesh(), compute_dtype())
    measuring = _Measuring(operator_for(adapter), list(times), epsilon)
    peers, own = Peers(), {}
    with torch.no_grad(), tap_ops(model, adapter, measuring):
        for turn in progress(turns(rows), "analyze", -(-len(rows) // world_size())):
            measuring.start(turn.counts)
            _forward(model, turn.item)
            peers.agree(measuring.complain)
            if turn.counts:
                own[turn.number] = {
                    layer: _joined(parts) for layer, parts in measuring.found.items()
                }
    by_row = {row: seen for part in gather_objects(own) for row, seen in part.items()}
    return _gathered([by_row[row] for row in range(len(rows))], list(times))


@dataclass
class _Seen:
    """What one layer's call gave: metrics [H, n] and the last singular values [H, d]."""

    values: dict[str, Tensor]
    spectrum: Tensor
    heads: tuple[int, ...] | None = None
    """Which heads of the layer they are of; None for all."""


def _joined(parts: list[_Seen]) -> _Seen:
    """The heads of a layer that made several calls, in order; narrow spectra end in zeros."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([head for part in parts for head in part.heads or ()]).argsort()
    values = {name: torch.cat([part.values[name] for part in parts])[order] for name in METRICS}
    widest = max(part.spectrum.shape[-1] for part in parts)
    spectra = [F.pad(part.spectrum, (0, widest - part.spectrum.shape[-1])) for part in parts]
    return _Seen(values, torch.cat(spectra)[order])


class _Measuring:
    """Measures every call of a forward pass; after the first state that is not finite, none."""

    def __init__(self, operator: Operator, times: list[int], epsilon: float) -> None:
        self.operator, self.times, self.epsilon = operator, times, epsilon
        self.found: dict[int, list[_Seen]] = {}
        self.counting = False
        self.complaint: UserError | None = None

    def start(self, counting: bool) -> None:
        """Forget the last forward pass."""
        self.found, self.counting = {}, counting

    def complain(self) -> None:
        if self.complaint is not None:
            raise self.complaint

    def __call__(self, call: OpCall) -> None:
        if not self.counting or self.complaint is not None:
            return
        try:
            self.found.setdefault(call.layer, []).append(self._measure(call))
        except UserError as error:
            self.complaint = error

    def _measure(self, call: OpCall) -> _Seen:
        states = states_after(call, self.operator, self.times)
        spectra = [
            singular_values(_finite(state[0], call, time)).cpu()
            for time, state in zip(self.times, states, strict=True)
        ]
        measures = measure(torch.stack(spectra, 1), self.epsilon)
        means = {"decay": call.decay, "beta": call.strength}
        values = {name: getattr(measures, name) for name in MEASURES}
        for name, x in means.items():
            values[name] = segment_means(x[0], self.times).T.cpu()
        return _Seen(values, spectra[-1], call.heads)


def _finite(state: Float[Tensor, "H K V"], call: OpCall, time: int) -> Tensor:
    bad = (~torch.isfinite(state)).flatten(1).any(1)
    if bool(bad.any()):
        head = int(bad.nonzero()[0])
        head = head if call.heads is None else call.heads[head]
        raise UserError(
            f"layer {call.layer} head {head}: the state after token {time} is not finite: "
            "check the model's weights"
        )
    return state


def _forward(model: nn.Module, tokens: Tensor) -> None:
    # Logits are not looked at, and those of all tokens would take most of the memory.
    model(input_ids=tokens.to(local_device()), use_cache=False, logits_to_keep=1)


def _gathered(found: list[dict[int, _Seen]], times: list[int]) -> Analysis:
    layers = sorted(found[0])
    values = {
        name: torch.stack([torch.stack([seen[at].values[name] for at in layers]) for seen in found])
        for name in METRICS
    }
    spectra = [torch.stack([seen[at].spectrum for seen in found]) for at in layers]
    return Analysis(layers, times, values, spectra)
