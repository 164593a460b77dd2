"""From taps to statistics: every tensor that a tap delivers is checked and then summed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flame.errors import UserError
from pruning.adapters import Adapter
from pruning.op_call import OpCall
from pruning.repair.gate_taps import tap_gate_inputs
from pruning.repair.pruned_mixers import PrunedMixers
from pruning.replay import Replay
from pruning.replay_taps import tap_replays
from pruning.spaces import Space
from pruning.states.rollout import sampled_states
from pruning.statistics import GateInput, OutputPair, Source, Statistic
from pruning.statistics.products import AddProducts, SumOfProducts, add_products_
from pruning.statistics.row_sample import RowSample
from pruning.taps import operator_for, tap_mixer_inputs, tap_mixer_outputs, tap_ops

OP_TENSORS = ("q", "k", "v", "beta", "g")


class Feed:
    """Updates statistics from the taps of a model, one sequence at a time.

    The first NaN or infinity stops the updates and is stored; `complain` raises it later. Raised in
    the middle of a forward pass, it would leave the other ranks waiting in a gather.
    """

    def __init__(
        self,
        collected: Mapping[str, Mapping[type[Statistic], Statistic]],
        spaces: Iterable[Space],
        adapter: Adapter,
        sample: RowSample,
        is_replayed: Callable[[int], bool] = lambda sequence: True,
        pruned: PrunedMixers | None = None,
        products: AddProducts = add_products_,
    ) -> None:
        self.adapter, self.sample, self.is_replayed = adapter, sample, is_replayed
        self.pruned = pruned
        # Looked up before a tap takes its place, or the states' own calls would be tapped.
        self.operator = operator_for(adapter)
        self.sequence: int | None = None
        self.complaint: UserError | None = None
        self.calls: dict[int, OpCall] = {}
        self.spaces = list(spaces)
        self.fed: dict[Source, dict[int, list[Statistic]]] = {}
        for space in self.spaces:
            for statistic in collected[space.name].values():
                if isinstance(statistic, SumOfProducts):
                    statistic.add_products_ = products
                of_layer = self.fed.setdefault(statistic.source, {})
                of_layer.setdefault(space.layer, []).append(statistic)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Open the taps that the statistics need."""
        with ExitStack() as stack:
            if {Source.OP, Source.STATE, Source.REPLAY} & self.fed.keys():
                stack.enter_context(tap_ops(model, self.adapter, self._on_call))
            if Source.REPLAY in self.fed:
                tap = tap_replays(model, self.adapter, self.operator, self.calls, self._on_replay)
                stack.enter_context(tap)
            if Source.MIXER_INPUT in self.fed:
                stack.enter_context(tap_mixer_inputs(model, self.adapter, self._on_input))
            if Source.OUTPUT in self.fed:
                stack.enter_context(tap_mixer_outputs(model, self.adapter, self._on_output))
            if Source.GATE_INPUT in self.fed:
                stack.enter_context(tap_gate_inputs(model, self.spaces, self._on_gate))
            if self.pruned is not None:
                stack.enter_context(self.pruned.attached(model, self.adapter, self._on_pair))
            yield

    def start(self, sequence: int | None) -> None:
        """Set the number, from 0, of the sequence that runs next; None if it is not counted."""
        self.sequence = sequence

    def complain(self) -> None:
        """Raise UserError if something that was not finite has been seen."""
        if self.complaint is not None:
            raise self.complaint

    @torch.no_grad()
    def _on_call(self, call: OpCall) -> None:
        given = {name: getattr(call, name) for name in OP_TENSORS}
        if not self._accepts(call.layer, given, "at the tap of the delta-rule call"):
            return
        assert self.sequence is not None
        call.sampled = self.sample.of_sequence(self.sequence)
        self._give(Source.OP, call.layer, call)
        if Source.STATE in self.fed:
            self._on_states(call)
        if Source.REPLAY in self.fed and self.is_replayed(self.sequence):
            self.calls[call.layer] = call

    def _on_states(self, call: OpCall) -> None:
        for states in sampled_states(call, self.operator):
            if not self._accepts(call.layer, {"a recurrent state": states}, "of the delta rule"):
                return
            self._give(Source.STATE, call.layer, states)

    def _on_input(self, layer: int, hidden: Tensor) -> None:
        if self._accepts(layer, {"the token mixer's input": hidden}, "before the projections"):
            self._give(Source.MIXER_INPUT, layer, hidden)

    def _on_output(self, layer: int, out: Tensor) -> None:
        if self._accepts(layer, {"the heads' output": out}, "before the output projection"):
            self._give(Source.OUTPUT, layer, out)

    def _on_gate(self, layer: int, seen: GateInput) -> None:
        given = {"a gate's inner channels": seen.inner}
        if self._accepts(layer, given, "between its two projections"):
            self._give(Source.GATE_INPUT, layer, seen)

    def _on_replay(self, layer: int, replay: Replay) -> None:
        self._give(Source.REPLAY, layer, replay)
        for statistic in self.fed[Source.REPLAY].get(layer, []):
            for total in statistic.state_dict().values():
                self._accepts(layer, {"the heads' output": total}, "once a channel is removed")

    def _on_pair(self, layer: int, pair: OutputPair) -> None:
        given = {"the dense heads' output": pair.dense, "the pruned heads' output": pair.pruned}
        if self._accepts(layer, given, "before the output projection"):
            self._give(Source.OUTPUT_PAIR, layer, pair)

    def _accepts(self, layer: int, given: Mapping[str, Tensor | None], where: str) -> bool:
        """Whether to sum these tensors; stores a complaint if one of them is not finite."""
        if self.sequence is None or self.complaint is not None:
            return False
        bad = first_not_finite(given)
        if bad is not None:
            self.complaint = UserError(
                f"layer {layer}, calibration sequence {self.sequence + 1}: {bad} holds a NaN or an "
                f"infinity {where}: check the model's weights and the precision that calibration "
                "runs in"
            )
        return bad is None

    def _give(self, source: Source, layer: int, seen: Any) -> None:
        for statistic in self.fed.get(source, {}).get(layer, []):
            statistic.update(seen)


def first_not_finite(given: Mapping[str, Tensor | None]) -> str | None:
    """The name of the first tensor with a NaN or an infinity; None if all are finite."""
    tensors = {name: x for name, x in given.items() if x is not None}
    # A sum is fast and shows every NaN and infinity; that it may overflow is looked at then.
    totals = torch.stack([x.sum().double() for x in tensors.values()])
    if bool(totals.isfinite().all()):
        return None
    return next((name for name, x in tensors.items() if not bool(x.isfinite().all())), None)
