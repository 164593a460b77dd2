"""What a selection method is, and what methods share: statistics, the k largest scores."""

from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from pruning.spaces import Kind, Space, check_count
from pruning.statistics import Statistic

S = TypeVar("S", bound=Statistic)
Statistics = Mapping[type[Statistic], Statistic]
Weights = Mapping[str, Tensor]


class Method(Protocol):
    """A frozen dataclass that chooses the channels of a space to keep.

    Its fields are its hyper-parameters and its command-line options (flame/options.py). A
    method may also have

    - `scores(space, weights, statistics) -> Float64[Tensor, "H d"]`, larger for channels that
      matter more and comparable between the spaces of a model; shared budgets need it. They rank
      what `select` keeps, unless it chooses sets (output-error);
    - `new_tensors(space, widths, weights, statistics) -> dict[str, Tensor]`: tensors of the pruned
      size (`widths`, a tuple, channels of each head) that take the place of sliced ones, where the
      method mixes channels and `select` returns the first k of the mixed ones;
    - `notes(config, kinds) -> list[str]`: sentences that a user must read beside the plan;
    - `paper: ClassVar[Mapping[str, Any]]`: hyper-parameters that `--paper` sets, as published.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    name: ClassVar[str]
    """The name in METHODS and on the command line."""
    kinds: ClassVar[tuple[Kind, ...]]
    """The kinds of spaces that it chooses in."""
    needs: ClassVar[tuple[type[Statistic], ...]]
    """The statistics that it chooses from; with none, no data is read."""

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The k channels to keep in each head, in increasing order.

        Deterministic: the same weights and statistics give the same choice, on every machine
        of a job and for every number of them.

        Args:
            space: the space to choose from.
            k: how many channels of each head to keep.
            weights: the whole tensors of the space's axes, float32 or float64, by name.
            statistics: the sums for this space, of the types in `needs`.

        Raises:
            ValueError: k is not within 1..head_dim, or the input has no finite answer.
        """
        ...


def summed(statistics: Statistics, kind: type[S], space: Space, method: type[Method] | Method) -> S:
    """The statistic of one kind; ValueError if nothing has been summed into it."""
    statistic = statistics[kind]
    assert isinstance(statistic, kind)
    if statistic.is_empty:
        raise ValueError(f"{space.name}: no data were seen, so {method.name} has nothing to go by")
    return statistic


def top_channels(space: Space, k: int, scores: Float64[Tensor, "H d"]) -> Int64[Tensor, "H k"]:
    """The k channels with the largest scores in each head, in increasing order.

    Ties go to the lower index.
    """
    check_count(k, space.head_dim, f"{space.noun} of {space.name}")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"{space.name}: the scores hold a NaN or an infinity")
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=-1).values
