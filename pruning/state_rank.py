"""Rank of recurrent states: spectra, ranks, the two groups of heads, and how stable they are.

A state `S` is a d_k x d_v matrix with singular values `s_1 >= ... >= s_d`, d = min(d_k, d_v).

- stable rank `sum s_i^2 / s_1^2`, and rank utilisation, its share of d: arXiv 2602.04852;
- threshold rank `#{s_i > epsilon s_1}`, epsilon 1e-4, and nuclear norm `sum s_i`: arXiv 2602.02195;
- entropy rank `exp(-sum p_i ln p_i)` with `p_i = s_i / sum s_j`: Roy and Vetterli, EUSIPCO 2007.

All of them are at least 1 and at most d; a state of zeros has rank 0. Everything here is float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPSILON = 1e-4
"""Singular values above this share of the largest count for the threshold rank."""

COUNTS_PER_OCTAVE = 2


@dataclass(frozen=True)
class RankMeasures:
    """Figures of a batch of states, one for each state."""

    stable_rank: Float[Tensor, "..."]
    utilisation: Float[Tensor, "..."]
    """Stable rank over min(d_k, d_v)."""
    threshold_rank: Float[Tensor, "..."]
    entropy_rank: Float[Tensor, "..."]
    nuclear_norm: Float[Tensor, "..."]
    sigma_1: Float[Tensor, "..."]
    sigma_ratio: Float[Tensor, "..."]
    """Largest over smallest singular value; infinite for a singular state, NaN for one of zeros."""


@dataclass(frozen=True)
class Groups:
    """Heads split in two by their ranks (State Rank Stratification, arXiv 2602.02195)."""

    bound: float
    """Heads above it are of high rank; NaN if all ranks are equal and there is no split."""
    high: Bool[Tensor, " n"]
    separation: float
    """Share of the ranks' variance that lies between the groups. 0.75 for ranks that are spread
    evenly and 0.64 for normal ones, so two groups are there only well above these."""


def token_counts(length: int, per_octave: int = COUNTS_PER_OCTAVE) -> list[int]:
    """Log-spaced numbers of tokens from 1 to `length`, powers of two and `length` among them."""
    if length < 1 or per_octave < 1:
        raise ValueError(f"counts for {length} tokens, {per_octave} an octave: both at least 1")
    steps = range(math.floor(math.log2(length) * per_octave) + 1)
    return sorted({*(round(2 ** (step / per_octave)) for step in steps), length})


def segment_means(x: Float[Tensor, "... T H"], counts: Sequence[int]) -> Float[Tensor, "n ... H"]:
    """Means over the tokens between successive `counts`, the first from token 0."""
    ends = torch.tensor([0, *counts], device=x.device)
    return torch.stack(
        [part.double().mean(-2) for part in x[..., : ends[-1], :].split(ends.diff().tolist(), -2)]
    )


def singular_values(states: Float[Tensor, "... K V"]) -> Float[Tensor, "... d"]:
    """Singular values in decreasing order, float64, of finite `states`.

    By SVD on a CPU; elsewhere from the Gram matrix of the shorter side, whose batched eigenvalues
    are faster there. The Gram matrix is float64: the roots of its eigenvalues are then right down
    to 1e-8 of the largest, in float32 only to 3e-4, where thresholds of 1e-4 count noise.
    """
    states = states.double()
    if states.device.type == "cpu":
        return torch.linalg.svdvals(states)
    return gram_singular_values(states)


def gram_singular_values(states: Float[Tensor, "... K V"]) -> Float[Tensor, "... d"]:
    """Singular values as roots of the eigenvalues of the smaller Gram matrix, decreasing.

    Values below `eps ** 0.5` of the largest are noise, with the `eps` of the states' dtype.
    """
    wide = states.mT if states.shape[-2] > states.shape[-1] else states
    return torch.linalg.eigvalsh(wide @ wide.mT).clamp_min(0).sqrt().flip(-1)


def measure(values: Float[Tensor, "... d"], epsilon: float = EPSILON) -> RankMeasures:
    """Ranks and norms from singular values in decreasing order."""
    largest, total = values[..., 0], values.sum(-1)
    tiny = torch.finfo(values.dtype).tiny
    stable = shares(values).square().sum(-1)
    return RankMeasures(
        stable_rank=stable,
        utilisation=stable / values.shape[-1],
        threshold_rank=(values > epsilon * values[..., :1]).sum(-1).to(values.dtype),
        entropy_rank=_entropy(values / total.clamp_min(tiny)[..., None]).exp() * (total > 0),
        nuclear_norm=total,
        sigma_1=largest,
        sigma_ratio=largest / values[..., -1],
    )


def shares(values: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Singular values over the largest of each state; zeros for a state of zeros."""
    return values / values[..., :1].clamp_min(torch.finfo(values.dtype).tiny)


def _entropy(p: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    return -torch.special.xlogy(p, p).sum(-1)


def split(ranks: Float[Tensor, " n"]) -> Groups:
    """The two groups whose ranks vary least within: exact 2-means in one dimension (Otsu, 1979).

    The bound lies midway between the groups; among equally good splits the lowest.
    """
    ordered = ranks.double().sort().values
    n, total = len(ordered), ordered.sum()
    variance = (ordered - ordered.mean()).square().sum()
    if n < 2 or ordered[-1] - ordered[0] <= 1e-9 * ordered[-1].abs():
        return Groups(math.nan, torch.zeros(n, dtype=torch.bool), math.nan)
    below = torch.arange(1, n, dtype=torch.float64)
    gap = ordered.cumsum(0)[:-1] / below - (total - ordered.cumsum(0)[:-1]) / (n - below)
    between = below * (n - below) / n * gap.square()
    last = int(between.argmax())
    bound = float(ordered[last] + ordered[last + 1]) / 2
    return Groups(bound, ranks > bound, float(between[last] / variance))


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation, ties by their mean position; NaN if either is constant."""
    a, b = (_positions(z.double()) - (len(z) - 1) / 2 for z in (x, y))
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else math.nan


def _positions(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The position of each element in sorted order, the mean one for elements that are equal."""
    less = (x[None, :] < x[:, None]).sum(1)
    equal = (x[None, :] == x[:, None]).sum(1)
    return less.double() + (equal - 1).double() / 2


def cosine(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Cosine of two vectors; NaN if either is zero."""
    norm = float(x.double().norm() * y.double().norm())
    return float(x.double() @ y.double()) / norm if norm > 0 else math.nan
