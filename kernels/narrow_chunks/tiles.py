# mypy: ignore-errors
"""Where a program's tokens lie, and the tiles that it loads and stores: what the kernels share.

T tokens, B rows or N documents of them, H key heads, HV value heads, keys of width K and values of
width V, chunks of C tokens. Log-decays `g` are running sums inside a chunk, in base 2.
"""

import triton
import triton.language as tl

from kernels.narrow_chunks.pieces import CHUNK

C = tl.constexpr(CHUNK)


@triton.jit
def head_of_chunk(HV: tl.constexpr, PARTS: tl.constexpr):
    """Return part, value head and chunk of this program: parts of a chunk's head are neighbours."""
    program = tl.program_id(0).to(tl.int64)
    return program % PARTS, program // PARTS % HV, program // PARTS // HV


@triton.jit
def tokens_of_chunk(i_chunk, T, cu_seqlens, chunk_indices):
    """Return the first token of a chunk, counted over all rows, and the tokens from it to the end
    of its row or document.
    """
    if cu_seqlens is None:
        chunks = tl.cdiv(T, C)
        start = i_chunk % chunks * C
        return i_chunk // chunks * T + start, T - start
    else:
        document = tl.load(chunk_indices + 2 * i_chunk)
        start = tl.load(chunk_indices + 2 * i_chunk + 1).to(tl.int64) * C
        first = tl.load(cu_seqlens + document).to(tl.int64) + start
        return first, tl.load(cu_seqlens + document + 1).to(tl.int64) - first


@triton.jit
def tokens_of_document(i_document, T, cu_seqlens, chunk_offsets):
    """Return the first token of a row or document, its tokens, and its first chunk."""
    if cu_seqlens is None:
        return i_document * T, T, i_document * tl.cdiv(T, C)
    else:
        first = tl.load(cu_seqlens + i_document).to(tl.int64)
        tokens = (tl.load(cu_seqlens + i_document + 1).to(tl.int64) - first).to(tl.int32)
        return first, tokens, tl.load(chunk_offsets + i_document).to(tl.int64)


@triton.jit
def zero_rows(WIDTH: tl.constexpr):
    """Return `[C, WIDTH]` zeros. Triton before 3.9 cannot make them of a piece's bare width."""
    return tl.zeros([C, WIDTH], tl.float32)


@triton.jit
def places_of_rows(base, stride, left, start, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Return the pointers `[C, WIDTH]` of columns from `start` of a chunk's rows, and which are
    there: rows before `left`, columns before `LIMIT`.
    """
    rows, columns = tl.arange(0, C), start + tl.arange(0, WIDTH)
    keep = (rows < left)[:, None] & (columns < LIMIT)[None, :]
    return base + rows[:, None] * stride + columns[None, :], keep


@triton.jit
def load_rows(base, stride, left, start, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Return `[C, WIDTH]` of `places_of_rows`; 0 where there is nothing."""
    places, keep = places_of_rows(base, stride, left, start, WIDTH, LIMIT)
    return tl.load(places, mask=keep, other=0.0)


@triton.jit
def store_rows(base, value, stride, left, start, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Write what `load_rows` would read."""
    places, keep = places_of_rows(base, stride, left, start, WIDTH, LIMIT)
    tl.store(places, value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def load_scalars(base, stride, left):
    """Return a chunk's `[C]` numbers of one head, such as rates, in float32; 0 from `left`."""
    rows = tl.arange(0, C)
    return tl.load(base + rows * stride, mask=rows < left, other=0.0).to(tl.float32)


@triton.jit
def store_scalars(base, value, stride, left):
    rows = tl.arange(0, C)
    tl.store(base + rows * stride, value.to(base.dtype.element_ty), mask=rows < left)


@triton.jit
def places_in_state(
    base,
    first_key,
    first_value,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    V_FIRST: tl.constexpr,
):
    """Return the pointers `[KEYS, VALUES]` of a part of a state in either layout, and which are
    inside it.
    """
    keys, values = first_key + tl.arange(0, KEYS), first_value + tl.arange(0, VALUES)
    inside = (keys < K)[:, None] & (values < V)[None, :]
    if V_FIRST:
        places = base + keys[:, None] + values[None, :] * K
    else:
        places = base + keys[:, None] * V + values[None, :]
    return places, inside


@triton.jit
def load_state(
    base,
    first_key,
    first_value,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    V_FIRST: tl.constexpr,
):
    """Return `[KEYS, VALUES]` of a state; zero without one (`base` None)."""
    if base is None:
        return tl.zeros([KEYS, VALUES], tl.float32)
    else:
        places, inside = places_in_state(base, first_key, first_value, KEYS, VALUES, K, V, V_FIRST)
        return tl.load(places, mask=inside, other=0.0)


@triton.jit
def store_state(
    base,
    state,
    first_key,
    first_value,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    V_FIRST: tl.constexpr,
):
    """Write what `load_state` would read."""
    places, inside = places_in_state(base, first_key, first_value, KEYS, VALUES, K, V, V_FIRST)
    tl.store(places, state.to(base.dtype.element_ty), mask=inside)


@triton.jit
def last_decay(g, stride, left):
    """Return the log-decay over the whole chunk: that of its last token."""
    return tl.load(g + (tl.minimum(left, C) - 1) * stride).to(tl.float32)


@triton.jit
def channel_decays(gk, stride, left, start, WIDTH: tl.constexpr):
    """Return `[WIDTH, 1]`: the decay of each key channel from `start` over the whole chunk."""
    last = gk + (tl.minimum(left, C) - 1) * stride
    total = tl.load(last + start + tl.arange(0, WIDTH)).to(tl.float32)
    return tl.exp2(total)[:, None]


@triton.jit
def pair_decays(g, stride, left, STRICT: tl.constexpr):
    """Return `[i, j]`: the decay from token j to token i, 0 unless j <= i (STRICT: j < i).

    Masked before the exponential, so that nothing overflows. Without `g` nothing decays.
    """
    rows = tl.arange(0, C)
    keep = (rows[:, None] >= rows[None, :]) & (rows < left)[:, None]
    if STRICT:
        keep = keep & (rows[:, None] > rows[None, :])
    if g is None:
        return keep.to(tl.float32)
    else:
        total = load_scalars(g, stride, left)
        return tl.exp2(tl.where(keep, total[:, None] - total[None, :], float("-inf")))
