"""PCA: project queries and keys on the directions in which keys vary most."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from flame.options import option
from pruning.methods.interface import Statistics, Weights, summed
from pruning.spaces import Axis, Kind, Space, check_count, positions
from pruning.statistics import NormalisedGrams, Statistic

_EQUAL = 1e-9
"""Entries of an eigenvector whose sizes differ by less than this count as equal."""

HAVE_QK_ACTIVATION = ("delta_net", "delta_net2")
"""Families whose config names the activation of q and k; the others have silu."""


@dataclass(frozen=True)
class PCA:
    """Principal components of each head's L2-normalised keys (arXiv 2602.04852).

    The eigenvectors V of their covariance (with `queries` that of keys and queries together) turn
    the rows of W_q and W_k into Vᵀ W, of which the first k are kept; convolution kernels become
    (V²)ᵀ times the kernels. That commutes with convolution and activation only where all channels
    of a head share one kernel and there is no activation: elsewhere it is an approximation, and the
    notes say so. All in float64; an eigenvector's largest entry is positive.
    """

    name: ClassVar[str] = "pca"
    kinds: ClassVar[tuple[Kind, ...]] = ("key",)
    needs: ClassVar[tuple[type[Statistic], ...]] = (NormalisedGrams,)

    queries: bool = option(False, "components of keys and queries together, not of keys alone")
    uncentered: bool = option(False, "of the second moment, with the mean, not of the covariance")

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The numbers 0 to k - 1 for each head: its first k components, by decreasing variance.

        Raises:
            ValueError: k is not from 1 to the head's width, or no calibration data were seen.
        """
        check_count(k, space.head_dim, f"{space.noun} of {space.name}")
        self._moment(space, statistics)
        return torch.arange(k).repeat(space.num_heads, 1)

    def scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Variances of the components, decreasing: of unit vectors, so comparable between heads."""
        return self._components(space, statistics)[0]

    def new_tensors(
        self, space: Space, k: int | Iterable[int], weights: Weights, statistics: Statistics
    ) -> dict[str, Float64[Tensor, "..."]]:
        """Every tensor of the space in the pruned size, its channels mixed, in float64.

        Args:
            k: components to keep, of each head or of all.

        Raises:
            ValueError: something acts on each channel by itself, such as KDA's decays, so that no
                mixture of channels can have it.
        """
        widths = [k] * space.num_heads if isinstance(k, int) else list(k)
        kept = tuple(torch.arange(width) for width in widths)
        vectors = self._components(space, statistics)[1]
        return {
            axis.fqn: _mixed(axis, weights[axis.fqn], vectors).index_select(
                axis.dim, positions(axis, kept)
            )
            for axis in space.axes
        }

    def notes(self, config: dict[str, Any], kinds: Iterable[str]) -> list[str]:
        """Whether the projection is exact in a model of this config, but for what it leaves out."""
        reason = approximate_because(config)
        if reason is None:
            return ["pca: the projection is exact, but for the components that it leaves out"]
        return [f"pca: the projection is an approximation at any width: {reason}"]

    def _components(
        self, space: Space, statistics: Statistics
    ) -> tuple[Float64[Tensor, "H d"], Float64[Tensor, "H d d"]]:
        """Variances, decreasing, and the components as columns."""
        values, vectors = torch.linalg.eigh(self._moment(space, statistics))
        vectors = vectors.flip(-1)
        size = vectors.abs()
        largest = (size >= (1 - _EQUAL) * size.amax(-2, keepdim=True)).int().argmax(-2)
        signs = vectors.gather(-2, largest[:, None, :]).sign()
        return values.flip(-1).clamp_min(0), vectors * signs

    def _moment(self, space: Space, statistics: Statistics) -> Float64[Tensor, "H d d"]:
        statistic = summed(statistics, NormalisedGrams, space, self)
        gram, total, rows = statistic.key_gram, statistic.key_sum, statistic.keys
        if self.queries:
            gram, total = gram + statistic.query_gram, total + statistic.query_sum
            rows = rows + statistic.queries
        mean = (total / rows).cpu()
        second = (gram / rows).cpu()
        return second if self.uncentered else second - mean[:, :, None] * mean[:, None, :]


def approximate_because(config: dict[str, Any]) -> str | None:
    """Why channels of q and k cannot be mixed exactly in a model of this config; None if they can.

    Only models whose convolutions (if any) have one kernel for all channels of a head, whose
    activation is the identity and whose norm is that of L2 can.
    """
    if config.get("qk_norm", "l2") != "l2":
        return f"qk_norm {config['qk_norm']!r} does not keep its value when channels are mixed"
    activation = config.get("qk_activation", "silu")
    if config.get("model_type") not in HAVE_QK_ACTIVATION:
        activation = "silu"
    if activation != "identity":
        return f"{activation} acts on each channel of q and k by itself"
    if config.get("use_short_conv", True) and not shares_kernels(config):
        return "the channels of a head have convolution kernels of their own"
    return None


def shares_kernels(config: dict[str, Any]) -> bool:
    """Whether all channels of a head share one convolution kernel in a model of this config."""
    sharing = config.get("conv_sharing", "layer")
    return config.get("model_type") == "delta_net2" and sharing in ("layer", "head")


def _mixed(axis: Axis, weight: Tensor, vectors: Float64[Tensor, "H d d"]) -> Float64[Tensor, "..."]:
    """The tensor with the channels of each head mixed along the axis, the size still whole."""
    if axis.role not in ("projection", "convolution"):
        raise ValueError(f"pca mixes key channels, and {axis.fqn} acts on each of them by itself")
    mixing = vectors.mT.square() if axis.role == "convolution" else vectors.mT
    old = weight.detach().cpu().double().movedim(axis.dim, 0)
    new = old.clone()
    for at in axis.layout.table().unbind(-1):
        new[at] = (mixing @ old[at].flatten(2)).view(*at.shape, *old.shape[1:])
    return new.movedim(0, axis.dim)
