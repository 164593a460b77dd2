"""Strong rank-revealing QR in Gram form: one algorithm, longer than a module should be.

Legend: M is an n x d matrix whose columns are channels, G = MᵀM its Gram matrix, S the k selected
columns, T the rest. In terms of the triangular factor [A B; 0 C] of M's columns ordered S, T:

- W = G_SS⁻¹ = (AᵀA)⁻¹, so that 1 / W_ii is the squared distance of column i from the span of the
  other selected ones;
- X = W G_ST = A⁻¹B, the coefficients of T in terms of S;
- c = diag(G_TT − G_TS X), the squared lengths of C's columns: what S misses of each column of T.

Exchanging i of S with j of T multiplies det(G_SS) by ρ_ij² = X_ij² + W_ii c_j. Gu and Eisenstat
(SIAM J. Sci. Comput. 17(4), 1996, lemma 3.1 and theorem 3.2) show that once no ρ_ij exceeds f,

    σ_i(M_S) ≥ σ_i(M) / q  and  σ_j(C) ≤ σ_{k+j}(M) q,  q = sqrt(1 + f² k (d − k)).

All of it is symmetric in T and S when written as one d x d tableau [−W X; Xᵀ C]: an exchange is a
principal pivot of it on the 2 x 2 block of i and j, whose determinant is −ρ_ij².

Precision: squaring M halves the digits. Singular values of M below sqrt(d eps) σ_1 are not
resolved: a squared residual below `d eps max(diag G)` counts as zero, and two that differ by less
count as equal.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from pruning.spaces import check_count

_CACHE_NUMBERS = 2**18
"""Numbers of the tableaux that are worked on together: they stay in a core's cache."""

_REFRESH = 32
"""Exchanges on one tableau before it is computed afresh, so that rounding cannot build up."""

_TIE = 1e-9
"""Squared volume ratios that differ by less than this fraction count as equal."""

_ASYMMETRY = 1e-9
"""Largest difference of mirrored entries, as a fraction of the largest entry."""


def strong_rrqr(
    gram: Float64[Tensor, "*batch d d"], k: int, f: float = 1.5, max_swaps: int | None = None
) -> Int64[Tensor, "*batch k"]:
    """The k columns of M, in increasing order, that strong rank-revealing QR selects from G = MᵀM.

    First k columns are pivoted as QR with column pivoting would (the column farthest from those
    taken), then pairs are exchanged, the one that grows the volume most first, until none would
    grow it by more than f. Each exchange grows the volume, so this ends. Ties go to the lower
    index. Where the rank r of G is below k, r columns are selected so, and the first unused ones
    fill up: the bound holds with these too.

    Args:
        gram: symmetric positive semidefinite matrices; any number of leading dimensions.
        k: columns to select, 1 to d.
        f: bound of Gu and Eisenstat, above 1.
        max_swaps: stop after so many exchanges per matrix, which gives up the bound.

    Cost: O(k d²) for the pivots and O(d²) for each exchange, per matrix.

    Raises:
        ValueError: an argument is out of range, or a matrix is not finite or not symmetric; its
            batch index is in the message.
    """
    _check_arguments(gram, k, f, max_swaps)
    d = gram.shape[-1]
    flat = gram.reshape(-1, d, d)
    kept = gram.new_empty((len(flat), k), dtype=torch.int64)
    threads = torch.get_num_threads() if gram.device.type == "cpu" else 1
    at_once = max(min(_CACHE_NUMBERS // d**2, -(-len(flat) // threads)), 1)

    def select(first: int) -> None:
        part = flat[first : first + at_once]
        _check_matrices(part, first, gram.shape[:-2])
        kept[first : first + at_once] = _indices(_select(_normalised(part), k, f, max_swaps), k)

    _share(select, range(0, len(flat), at_once), threads)
    return kept.reshape(*gram.shape[:-2], k)


def _share(work: Callable[[int], None], items: Sequence[int], threads: int) -> None:
    """Do `work` for each item, on so many threads whose own operations use one thread each."""
    if threads == 1 or len(items) < 2:
        for item in items:
            work(item)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


def _check_arguments(gram: Tensor, k: int, f: float, max_swaps: int | None) -> None:
    if gram.dtype != torch.float64 or gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(
            f"the Gram matrices are {gram.dtype} of shape {list(gram.shape)}, "
            f"expected float64 of shape [..., d, d]"
        )
    check_count(k, gram.shape[-1], "columns")
    check_bound(f, max_swaps)


def check_bound(f: float, max_swaps: int | None) -> None:
    """Raise ValueError unless f is finite and above 1 and a cap on exchanges not negative."""
    if not 1 < f < math.inf:
        raise ValueError(f"f is {f}: strong RRQR needs a finite f above 1, such as 1.5")
    if max_swaps is not None and max_swaps < 0:
        raise ValueError(f"max_swaps is {max_swaps}: give 0 or more, or None for no cap")


def _check_matrices(gram: Float64[Tensor, "n d d"], first: int, batch: torch.Size) -> None:
    scale = gram.abs().amax((-2, -1))
    asymmetry = (gram - gram.mT).abs().amax((-2, -1))
    for what, bad in (
        ("holds a NaN or an infinity", ~scale.isfinite()),
        ("is not symmetric", asymmetry > _ASYMMETRY * scale),
        ("has a negative diagonal entry", (gram.diagonal(dim1=-2, dim2=-1) < 0).any(-1)),
    ):
        if bool(bad.any()):
            index = torch.tensor(first + int(bad.nonzero()[0]))
            where = [int(i) for i in torch.unravel_index(index, batch)] if batch else "given"
            raise ValueError(f"the Gram matrix {where} {what}")


def _normalised(gram: Float64[Tensor, "n d d"]) -> Float64[Tensor, "n d d"]:
    # By a power of two, so without rounding: products of entries then stay within range.
    largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    exponent = torch.frexp(largest).exponent.clamp(-1000, 1000)
    return torch.ldexp((gram + gram.mT) / 2, -exponent[:, None, None])


def _indices(selected: Bool[Tensor, "n d"], k: int) -> Int64[Tensor, "n k"]:
    return selected.nonzero()[:, 1].view(-1, k)


def _resolution(gram: Float64[Tensor, "n d d"]) -> Float64[Tensor, " n"]:
    """Squared lengths below this are zero, and differences below it are ties."""
    eps = torch.finfo(torch.float64).eps
    return gram.shape[-1] * eps * gram.diagonal(dim1=-2, dim2=-1).amax(-1)


def _select(
    gram: Float64[Tensor, "n d d"], k: int, f: float, max_swaps: int | None
) -> Bool[Tensor, "n d"]:
    selected, rank = _pivot(gram, k)
    sound = torch.ones_like(rank, dtype=torch.bool)
    for r in rank.unique().tolist():
        same = (rank == r).nonzero().squeeze(-1)
        if 0 < r < gram.shape[-1]:
            selected[same], sound[same] = _exchange(gram[same], selected[same], f, max_swaps)
    if max_swaps is None:
        short = (rank < k).nonzero().squeeze(-1)
        sound[short] &= _nothing_left(gram[short], selected[short])
        for i in (~sound).nonzero().squeeze(-1).tolist():
            selected[i] = _grow(gram[i], k, f)
    return _fill(selected, k)


def _pivot(
    gram: Float64[Tensor, "n d d"], k: int
) -> tuple[Bool[Tensor, "n d"], Int64[Tensor, " n"]]:
    """The first k pivots of QR with column pivoting, fewer where the rank is, and their number.

    Left-looking Cholesky: row j of the factor is the pivot's row of G less what the rows above
    explain of it.
    """
    n, d = gram.shape[:2]
    heads = torch.arange(n, device=gram.device)
    residual = gram.diagonal(dim1=-2, dim2=-1).clone()
    resolution = _resolution(gram)
    factor = gram.new_zeros(n, k, d)
    selected = torch.zeros(n, d, dtype=torch.bool, device=gram.device)
    for j in range(k):
        pivot = _first_largest(residual.masked_fill(selected, -torch.inf), resolution)
        length = residual[heads, pivot]
        alive = (length > resolution) & ~selected[heads, pivot]
        above = factor[:, :j]
        explained = above[heads, :, pivot].unsqueeze(1) @ above
        row = (gram[heads, pivot] - explained.squeeze(1)) / length.clamp_min(resolution).sqrt()[
            :, None
        ]
        row = row.masked_fill(~alive[:, None], 0.0)
        factor[:, j] = row
        residual -= row.square()
        selected[heads, pivot] |= alive
    return selected, selected.sum(-1)


def _first_largest(
    values: Float64[Tensor, "n m"], tolerance: Float64[Tensor, " n"]
) -> Int64[Tensor, " n"]:
    """Index of the first value within `tolerance` of its row's largest."""
    threshold = values.amax(-1) - tolerance
    return (values >= threshold[:, None]).int().argmax(-1)


def _fill(selected: Bool[Tensor, "n d"], k: int) -> Bool[Tensor, "n d"]:
    """Select the first unused columns of each row until it has k."""
    missing = k - selected.sum(-1, keepdim=True)
    return selected | ((~selected).cumsum(-1) <= missing) & ~selected


def _exchange(
    gram: Float64[Tensor, "n d d"],
    selected: Bool[Tensor, "n d"],
    f: float,
    max_swaps: int | None,
) -> tuple[Bool[Tensor, "n d"], Bool[Tensor, " n"]]:
    """Exchange columns until no exchange grows the volume by more than f.

    Volumes are computed afresh after every `_REFRESH` exchanges and must have grown: a matrix
    on which rounding hides growth stays as it was, so this always ends. Such a matrix is unsound,
    the second result; so is one whose selection is singular to rounding.
    """
    settled, current = selected.clone(), selected.clone()
    sound = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    volume = gram.new_full((len(gram),), -torch.inf)
    left = torch.full_like(volume, torch.inf if max_swaps is None else max_swaps)
    busy = torch.arange(len(gram), device=gram.device)
    while len(busy):
        tableau, grown_to = _tableau(gram[busy], current[busy])
        grown = grown_to > volume[busy]
        sound[busy[~grown]] = False
        if not bool(grown.any()):
            break
        busy, tableau = busy[grown], tableau[grown]
        settled[busy], volume[busy] = current[busy], grown_to[grown]
        after, swaps = _exchange_some(tableau, current[busy], f, left[busy])
        current[busy] = after
        left[busy] -= swaps
        busy = busy[swaps > 0]
    return settled, sound


def _grow(gram: Float64[Tensor, "d d"], k: int, f: float) -> Bool[Tensor, " d"]:
    """Strong RRQR of one matrix, exchanging columns after every pivot and not only after the last.

    The coefficients X of Kahan-like matrices grow exponentially over the pivots, and with them the
    rounding errors of what is left, until neither the rank nor a volume can be computed. Exchanges
    in between keep X below f (algorithm 5 of Gu and Eisenstat), at k times the cost.
    """
    grams = gram[None]
    selected = torch.zeros_like(grams[0], dtype=torch.bool)[:1]
    for _ in range(k):
        residual = _residual(grams, selected).masked_fill(selected, -torch.inf)
        pivot = _first_largest(residual, _resolution(grams))
        if not bool(residual[0, pivot] > _resolution(grams)):
            break
        larger = selected.scatter(1, pivot[:, None], True)
        if bool(_tableau(grams, larger)[1].isnan()):
            break
        selected, _ = _exchange(grams, larger, f, None)
    return selected[0]


def _nothing_left(
    gram: Float64[Tensor, "n d d"], selected: Bool[Tensor, "n d"]
) -> Bool[Tensor, " n"]:
    """Whether the selected columns span the others, to the resolution of the Gram matrix."""
    spanned = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    count = selected.sum(-1)
    for r in count.unique().tolist():
        same = (count == r).nonzero().squeeze(-1)
        residual = _residual(gram[same], selected[same]).masked_fill(selected[same], 0.0)
        spanned[same] = residual.amax(-1) <= _resolution(gram[same])
    return spanned


def _residual(
    gram: Float64[Tensor, "n d d"], selected: Bool[Tensor, "n d"]
) -> Float64[Tensor, "n d"]:
    """Squared distances of the columns from the span of the selected ones."""
    tableau = _tableau(gram, selected)[0] if bool(selected.any()) else gram
    return tableau.diagonal(dim1=-2, dim2=-1)


def _tableau(
    gram: Float64[Tensor, "n d d"], selected: Bool[Tensor, "n d"]
) -> tuple[Float64[Tensor, "n d d"], Float64[Tensor, " n"]]:
    """[−W X; Xᵀ C] in the order of the columns, and log det G_SS (NaN if not positive definite)."""
    n, d = selected.shape
    kept = _indices(selected, int(selected[0].sum()))
    rows = gram.gather(1, kept[:, :, None].expand(-1, -1, d))
    inner = rows.gather(2, kept[:, None, :].expand(-1, kept.shape[1], -1))
    lower, failed = torch.linalg.cholesky_ex(inner)
    volume = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1) * 2
    volume = volume.masked_fill(failed > 0, torch.nan)
    factor = torch.linalg.solve_triangular(lower, rows, upper=False)
    coefficients = torch.linalg.solve_triangular(lower.mT, factor, upper=True)
    tableau = gram - factor.mT @ factor
    tableau.scatter_(1, kept[:, :, None].expand_as(rows), coefficients)
    columns = coefficients.mT.scatter(
        1, kept[:, :, None].expand_as(inner), -torch.cholesky_inverse(lower)
    )
    tableau.scatter_(2, kept[:, None, :].expand_as(columns), columns)
    return tableau, volume


def _exchange_some(
    tableau: Float64[Tensor, "n d d"],
    selected: Bool[Tensor, "n d"],
    f: float,
    left: Float64[Tensor, " n"],
) -> tuple[Bool[Tensor, "n d"], Float64[Tensor, " n"]]:
    """Up to `_REFRESH` exchanges in each matrix, and their number."""
    selected, swaps = selected.clone(), torch.zeros_like(left)
    busy = torch.arange(len(tableau), device=tableau.device)
    for _ in range(_REFRESH):
        growth, pair = _best_exchange(tableau, selected[busy])
        going = (growth > f * f) & (swaps[busy] < left[busy])
        if not bool(going.any()):
            break
        busy, pair = busy[going], pair[going]
        tableau = _principal_pivot(tableau[going], pair)
        selected[busy[:, None], pair] = selected[busy[:, None], pair].logical_not()
        swaps[busy] += 1
    return selected, swaps


def _best_exchange(
    tableau: Float64[Tensor, "n d d"], selected: Bool[Tensor, "n d"]
) -> tuple[Float64[Tensor, " n"], Int64[Tensor, "n 2"]]:
    """The largest ρ² and its pair: which column leaves, which enters; ties to the lower indices."""
    n, d = selected.shape
    k = int(selected[0].sum())
    leaving, entering = _indices(selected, k), _indices(~selected, d - k)
    diagonal = tableau.diagonal(dim1=-2, dim2=-1)
    inverse = -diagonal.gather(1, leaving)
    # A residual is a difference of larger numbers, and may round to below zero.
    residual = diagonal.gather(1, entering).clamp_min(0)
    rows = tableau.gather(1, leaving[:, :, None].expand(-1, -1, d))
    coefficients = rows.gather(2, entering[:, None, :].expand(-1, k, -1))
    growth = (coefficients.square() + inverse[:, :, None] * residual[:, None, :]).flatten(1)
    largest = growth.amax(-1)
    best = _first_largest(growth, _TIE * largest)
    i, j = best // (d - k), best % (d - k)
    pair = torch.stack([leaving.gather(1, i[:, None]), entering.gather(1, j[:, None])], -1)
    return largest, pair.squeeze(1)


def _principal_pivot(
    tableau: Float64[Tensor, "n d d"], pair: Int64[Tensor, "n 2"]
) -> Float64[Tensor, "n d d"]:
    """The tableau after the first of each pair leaves the selection and the second enters it."""
    d = tableau.shape[-1]
    across = pair[:, None, :].expand(-1, d, -1)
    columns = tableau.gather(2, across)
    block = columns.gather(1, pair[:, :, None].expand(-1, -1, 2))
    turn = torch.tensor([-1.0, 1.0], dtype=tableau.dtype, device=tableau.device)
    solved = torch.linalg.solve(block, columns.mT)
    inverse = torch.linalg.inv(block)
    tableau = torch.baddbmm(tableau, columns, solved, alpha=-1)
    turned = (solved * turn[:, None]).mT.scatter(
        1, pair[:, :, None].expand_as(block), -turn[:, None] * inverse * turn
    )
    tableau.scatter_(2, across, turned)
    return tableau.scatter_(1, across.mT, turned.mT)
