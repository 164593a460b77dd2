"""Collecting: a model runs over calibration sequences under FSDP2 and its taps feed statistics.

Every sequence is a batch of its own, dealt to the ranks in turn, so that what a sequence adds does
not depend on the number of processes. A rank without a sequence in the last round runs one token
that nothing counts, since FSDP2's gathers need every rank. Memory is the model's and the sums';
it does not grow with the number of tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flame.checkpoint.load import build_sharded
from flame.checkpoint.peers import Peers
from flame.checkpoint.reference import ModelReference
from flame.distributed import (
    data_parallel_mesh,
    device_type,
    gather_objects,
    local_device,
    rank,
    world_size,
)
from flame.errors import UserError
from flame.progress import progress
from pruning.adapters import Adapter, adapter_for
from pruning.calibration_data import CalibrationData
from pruning.statistics import Source, Statistic
from pruning.stats_file import Collected, Meta, zeros
from pruning.taps import OpCall, tap_mixer_inputs, tap_ops

Save = Callable[[Collected, Meta], None]


@dataclass(frozen=True)
class ResumePoints:
    """Where statistics are saved on the way: after about every so many sequences."""

    every: int
    """Rounded up to a multiple of the virtual shards, so that every world size can go on."""
    save: Save
    """Called on rank 0 with the sums so far."""


def collect(
    reference: ModelReference,
    kinds: tuple[type[Statistic], ...],
    data: CalibrationData,
    fingerprint: str,
    points: ResumePoints | None = None,
    resumed: tuple[Collected, Meta] | None = None,
) -> tuple[Collected, Meta]:
    """Statistics of the model of `reference` over `data`, the sums of all ranks on every rank.

    Collective over all ranks; needs a process group.

    Args:
        reference: the model.
        kinds: which statistics, for each of the model's spaces.
        data: what to run the model on.
        fingerprint: the model's, to be recorded.
        points: where to save on the way.
        resumed: sums and their record, to go on from; each rank gives the same record, the sums
            count on rank 0.

    Raises:
        UserError: on every rank: the data is shorter than asked for, or an activation that a
            statistic sees is NaN or infinite (layer and tap are named).
    """
    collector = _Collector(reference, kinds, data, fingerprint, resumed)
    return collector.run(points)


def compute_dtype() -> torch.dtype:
    """float32 on a CPU; bfloat16 on a GPU, where fla's kernels take no float32."""
    return torch.float32 if device_type() == "cpu" else torch.bfloat16


class _Collector:
    """One calibration in progress."""

    def __init__(
        self,
        reference: ModelReference,
        kinds: tuple[type[Statistic], ...],
        data: CalibrationData,
        fingerprint: str,
        resumed: tuple[Collected, Meta] | None,
    ) -> None:
        self.data, self.kinds, self.fingerprint = data, kinds, fingerprint
        self.adapter = adapter_for(reference.config)
        self.spaces = self.adapter.spaces(reference.config)
        self.collected = zeros(self.spaces, kinds, local_device())
        self.tokens = self.done = 0
        self.peers = Peers()
        self.loader = data.loader(rank(), world_size())
        if resumed is not None:
            self._resume(*resumed)
        self.model = build_sharded(reference, data_parallel_mesh(), compute_dtype())

    def run(self, points: ResumePoints | None) -> tuple[Collected, Meta]:
        batches = iter(self.loader)
        rounds = range(self.done, self.data.sequences, world_size())
        taps = _Taps(self.collected, {space.name: space.layer for space in self.spaces})
        try:
            with torch.no_grad(), taps.attached(self.model, self.adapter):
                for first in progress(rounds, "calibrate", len(rounds)):
                    self._round(first, batches, taps)
                    if points and self._is_due(points):
                        self._save_point(points)
        finally:
            self.loader.close()
        meta = self._reduce()
        return self.collected, meta

    def _round(self, first: int, batches: Iterator[Any], taps: "_Taps") -> None:
        """One sequence on every rank, or none on the last ones."""
        mine = first + rank() < self.data.sequences
        inputs = self.peers.agree(lambda: self._next(batches) if mine else None)
        taps.counting = inputs is not None
        _forward(self.model, inputs if inputs is not None else _nothing())
        self.tokens += inputs["input"].numel() if inputs is not None else 0
        self.done = min(first + world_size(), self.data.sequences)
        self.peers.agree(taps.complain)

    def _next(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        batch = next(batches, None)
        if batch is None:
            raise UserError(
                f"the data ends before {self.data.sequences} sequences of {self.data.seq_len} "
                "tokens: ask for fewer (--sequences, --seq-len)"
            )
        inputs, _ = batch
        return inputs

    def _is_due(self, points: ResumePoints) -> bool:
        shards = self.data.config.virtual_shards
        every = -(-points.every // shards) * shards
        return self.done % every == 0 and self.done < self.data.sequences

    def _save_point(self, points: ResumePoints) -> None:
        meta = self._reduce()
        self.peers.agree(lambda: points.save(self.collected, meta) if rank() == 0 else None)
        self.tokens = meta.tokens if rank() == 0 else 0
        if rank() > 0:
            for total in _sums(self.collected):
                total.zero_()

    def _reduce(self) -> Meta:
        """Sum the statistics over the ranks, and say what they are sums of. Collective."""
        for of_space in self.collected.values():
            for statistic in of_space.values():
                statistic.all_reduce_()
        return Meta(
            fingerprint=self.fingerprint,
            data=self.data.record(),
            seq_len=self.data.seq_len,
            seed=self.data.config.seed,
            wanted=self.data.sequences,
            sequences=self.done,
            tokens=sum(gather_objects(self.tokens)),
            statistics=sorted(kind.__name__ for kind in self.kinds),
            cursor=self.loader.merge_states(gather_objects(self.loader.state_dict())),
        )

    def _resume(self, collected: Collected, meta: Meta) -> None:
        self.loader.load_state_dict(meta.cursor)
        self.done = meta.sequences
        if rank() > 0:
            return
        self.tokens = meta.tokens
        for space, of_space in collected.items():
            for kind, statistic in of_space.items():
                self.collected[space][kind].load_state_dict(statistic.state_dict())


class _Taps:
    """Feeds statistics with what a model's taps deliver, as long as `counting` is set.

    A statistic's complaint is kept until `complain`: raised in the middle of a forward pass, it
    would leave the other ranks waiting in a gather.
    """

    def __init__(self, collected: Collected, layers: dict[str, int]) -> None:
        self.counting = False
        self.complaint: UserError | None = None
        self.fed: dict[Source, dict[int, list[Statistic]]] = {}
        for space, of_space in collected.items():
            for statistic in of_space.values():
                of_layer = self.fed.setdefault(statistic.source, {})
                of_layer.setdefault(layers[space], []).append(statistic)

    @contextmanager
    def attached(self, model: nn.Module, adapter: Adapter) -> Iterator[None]:
        """Open the taps that the statistics need."""
        with ExitStack() as stack:
            for source in self.fed:
                stack.enter_context(self._tap(source, model, adapter))
            yield

    def complain(self) -> None:
        """Raise what a statistic has complained of."""
        if self.complaint is not None:
            raise self.complaint

    def _tap(self, source: Source, model: nn.Module, adapter: Adapter) -> Any:
        if source is Source.OP:
            return tap_ops(model, adapter, self._on_call)
        if source is Source.MIXER_INPUT:
            return tap_mixer_inputs(model, adapter, self._on_input)
        raise ValueError(f"no tap delivers {source.value} yet")

    def _on_call(self, call: OpCall) -> None:
        self._feed(Source.OP, call.layer, call)

    def _on_input(self, layer: int, hidden: Tensor) -> None:
        self._feed(Source.MIXER_INPUT, layer, hidden)

    def _feed(self, source: Source, layer: int, seen: Any) -> None:
        if not self.counting or self.complaint is not None:
            return
        try:
            for statistic in self.fed[source].get(layer, []):
                statistic.update(seen)
        except UserError as error:
            self.complaint = error


def _forward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    given = {name: value.to(local_device()) for name, value in inputs.items()}
    # Logits are not looked at, and those of all tokens would take most of the memory.
    model(input_ids=given.pop("input"), use_cache=False, logits_to_keep=1, **given)


def _nothing() -> dict[str, Tensor]:
    return {"input": torch.zeros((1, 1), dtype=torch.int64)}


def _sums(collected: Collected) -> Iterator[Tensor]:
    for of_space in collected.values():
        for statistic in of_space.values():
            yield from statistic.state_dict().values()
