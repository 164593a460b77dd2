"""Calibration runs: a model reads sequences under FSDP2, and its taps feed the statistics.

Every sequence is a batch of its own, dealt to the ranks in turn, so that what it adds to a sum does
not depend on the number of processes. In the last round a rank without a sequence runs one token
that is not counted, since FSDP2's gathers need every rank. Memory holds the model and the sums, and
does not grow with the number of tokens. The backward pass runs only if a statistic needs it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from flame.checkpoint.load import build_sharded
from flame.checkpoint.reference import ModelReference
from flame.errors import UserError
from flame.process.dealing import Turn, turns
from flame.process.distributed import (
    compute_dtype,
    data_parallel_mesh,
    gather_objects,
    local_device,
    rank,
    world_size,
)
from flame.process.peers import Peers
from flame.process.progress import progress
from pruning.adapters import adapter_for
from pruning.calibration.data import CalibrationData
from pruning.calibration.feeding import Feed
from pruning.calibration.gradients import ReadRows, WeightGradients
from pruning.calibration.passes import run_batch
from pruning.calibration.products import products_for
from pruning.calibration.stats_file import AddGradient, Collected, Meta, zeros
from pruning.planning.plan import Plan
from pruning.repair.pruned_mixers import pruned_mixers
from pruning.repair.repaired import choice_mark
from pruning.spaces import Space
from pruning.statistics import Source, Statistic
from pruning.statistics.row_sample import row_sample

Write = Callable[[Collected, Meta], AbstractContextManager[AddGradient]]


@dataclass(frozen=True)
class ResumePoints:
    """When and how an unfinished calibration is saved."""

    every: int
    """Sequences between saves, rounded up to a multiple of the virtual shards, so that the
    calibration can be resumed at every world size."""
    write: Write
    """Entered on rank 0 with the sums so far; gradients are added in its body."""


@dataclass(frozen=True)
class Resumed:
    """What an earlier calibration left; rank 0 adds it to its sums."""

    collected: Mapping[str, Mapping[type[Statistic], Statistic]]
    """Empty on other ranks than the first."""
    meta: Meta
    gradients: ReadRows


def collect(
    reference: ModelReference,
    kinds: tuple[type[Statistic], ...],
    data: CalibrationData,
    fingerprint: str,
    points: ResumePoints | None = None,
    resumed: Resumed | None = None,
    plan: Plan | None = None,
) -> tuple[Collected, Meta]:
    """Statistics of the model of `reference` over `data`, the sums of all ranks on every rank.

    Collective over all ranks; needs a process group.

    Args:
        reference: the model.
        kinds: which statistics, for each of the model's spaces.
        data: what to run the model on.
        fingerprint: the model's, to be recorded.
        points: where to save on the way.
        resumed: what to go on from.
        plan: whose pruned layers to run beside the dense ones, with its new tensors in memory; the
            same on every rank.

    Raises:
        UserError: on every rank: the data is shorter than asked for, or an activation, a state or
            a gradient is NaN or infinite (layer and sequence are named).
    """
    collector = _Collector(reference, kinds, data, fingerprint, resumed, plan)
    return collector.run(points)


class _Collector:
    """One calibration in progress."""

    def __init__(
        self,
        reference: ModelReference,
        kinds: tuple[type[Statistic], ...],
        data: CalibrationData,
        fingerprint: str,
        resumed: Resumed | None,
        plan: Plan | None,
    ) -> None:
        self.mark = "" if plan is None else choice_mark(plan)
        self.data, self.kinds, self.fingerprint = data, kinds, fingerprint
        self.tokens = self.done = 0
        self.peers = Peers()
        adapter = adapter_for(reference.config)
        self.spaces = adapter.spaces(reference.config)
        mesh, dtype = data_parallel_mesh(), compute_dtype()
        self.model = build_sharded(reference, mesh, dtype)
        pruned = None if plan is None else pruned_mixers(reference, plan, mesh, dtype)
        self.hidden_size = _hidden_size(self.model, self.spaces)
        self.collected = zeros(self.spaces, kinds, self.hidden_size, local_device())
        self.gradients = self._gradients()
        sample = row_sample(data.sequences, data.seq_len, data.config.seed)
        products = products_for(local_device(), data.gram_products)
        self.feed = Feed(
            self.collected, self.spaces, adapter, sample, data.is_replayed, pruned, products
        )
        self.loader = data.loader(rank(), world_size())
        if resumed is not None:
            self._resume(resumed)

    def run(self, points: ResumePoints | None) -> tuple[Collected, Meta]:
        batches = iter(self.loader)
        left = range(self.done, self.data.sequences)
        try:
            with self.feed.attached(self.model):
                for turn in progress(turns(left), "calibrate", -(-len(left) // world_size())):
                    self._round(turn, batches)
                    if points and self._is_due(points):
                        self._save_point(points)
        finally:
            self.loader.close()
        self._add_gradients()
        return self.collected, self._reduce()

    def _round(self, turn: Turn[int], batches: Iterator[Any]) -> None:
        """Run one sequence on every rank; in the last round some ranks have none."""
        batch = self.peers.agree(lambda: self._next(batches) if turn.counts else None)
        self.feed.start(turn.item if turn.counts else None)
        run_batch(self.model, batch, self.gradients)
        self.tokens += batch[1].numel() if batch is not None else 0
        first, self.done = self.done, min(self.done + world_size(), self.data.sequences)
        self.peers.agree(lambda: self._take(first))

    def _take(self, first: int) -> None:
        """Add the gradients of this round; UserError if anything in it was not finite."""
        self.feed.complain()
        if self.gradients is not None:
            several = f"s {first + 1} to" if self.done > first + 1 else ""
            self.gradients.add(f"calibration sequence{several} {self.done}")

    def _next(self, batches: Iterator[Any]) -> tuple[dict[str, Tensor], Tensor]:
        batch = next(batches, None)
        if batch is None:
            raise UserError(self.data.too_short())
        return batch

    def _gradients(self) -> WeightGradients | None:
        kinds = [kind for kind in self.kinds if kind.source is Source.WEIGHT_GRADIENT]
        served = {space_kind for kind in kinds for space_kind in kind.kinds}
        spaces = [space for space in self.spaces if space.kind in served]
        return WeightGradients(self.model, spaces) if spaces else None

    def _add_gradients(self) -> None:
        """Update the statistics of whole gradients with this rank's share of them."""
        if self.gradients is None:
            return
        for space in self.spaces:
            for statistic in self.collected[space.name].values():
                if statistic.source is Source.WEIGHT_GRADIENT:
                    statistic.update(self.gradients.share(space, self.tokens))

    def _is_due(self, points: ResumePoints) -> bool:
        shards = self.data.config.virtual_shards
        every = -(-points.every // shards) * shards
        return self.done % every == 0 and self.done < self.data.sequences

    def _save_point(self, points: ResumePoints) -> None:
        meta = self._reduce()
        first, agree = rank() == 0, self.peers.agree
        with ExitStack() as stack:
            write = points.write(self.collected, meta)
            add = agree(lambda: stack.enter_context(write) if first else None)
            for gradient in self.gradients.whole() if self.gradients else ():
                agree(partial(add, *gradient) if add else lambda: None)
            agree(stack.close)
        self.tokens = meta.tokens if first else 0
        if not first:
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
            hidden_size=self.hidden_size,
            statistics=sorted(kind.__name__ for kind in self.kinds),
            cursor=self.loader.merge_states(gather_objects(self.loader.state_dict())),
            plan=self.mark,
        )

    def _resume(self, resumed: Resumed) -> None:
        self.loader.load_state_dict(resumed.meta.cursor)
        self.done = resumed.meta.sequences
        if self.gradients is not None:
            gradients = self.gradients
            self.peers.agree(lambda: gradients.load(resumed.gradients))
        if rank() > 0:
            return
        self.tokens = resumed.meta.tokens
        for space, of_space in resumed.collected.items():
            for kind, statistic in of_space.items():
                self.collected[space][kind].load_state_dict(statistic.state_dict())


def _hidden_size(model: nn.Module, spaces: list[Space]) -> int:
    """The width of a mixer's input: the columns of its projections."""
    axes = (axis for space in spaces for axis in space.axes)
    name = next(axis.fqn for axis in axes if axis.role == "projection" and axis.dim == 0)
    return dict(model.named_parameters())[name].shape[1]


def _sums(collected: Collected) -> Iterator[Tensor]:
    for of_space in collected.values():
        for statistic in of_space.values():
            yield from statistic.state_dict().values()
