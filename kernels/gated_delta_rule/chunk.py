"""The (gated) delta rule on tokens: flags and layouts around `chunked_delta_rule`.

B rows of T tokens, N documents, Hk key heads of width K, H value heads of width V.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.layout import (
    ChunkLayout,
    chunk_layout,
    document_lengths,
    from_chunks,
    to_chunks,
)
from kernels.gated_delta_rule.wy import chunked_delta_rule

CHUNK_SIZES = (16, 32, 64)
L2_EPS = 1e-6

ChunkedRule = Callable[..., tuple[Tensor, Tensor]]
"""A delta rule on chunks, with the arguments and results of `chunked_delta_rule`."""


@dataclass(frozen=True)
class Options:
    """What a caller of fla's operators chooses besides q, k, v, beta and g."""

    scale: float | None
    """Factor of q; None means `K ** -0.5`."""
    initial_state: Tensor | None
    output_final_state: bool
    normalize: bool
    """Whether q and k are L2-normalized."""
    cu_seqlens: Tensor | None
    """Boundaries of documents packed in one row; None if each row is a document."""
    state_v_first: bool = False
    """Whether states are `[N, H, V, K]` and not `[N, H, K, V]`."""


def chunk_gated_delta_rule(
    q: Float[Tensor, "B T Hk K"],
    k: Float[Tensor, "B T Hk K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H V"], Tensor | None]:
    """Return outputs and final states; the signature is that of fla 0.6.0's operator.

    `g` is the log-decay, or with `use_gate_in_kernel=True` the input of the gate
    `-exp(A_log) softplus(g + dt_bias)`. `beta` is a logit with `use_beta_sigmoid_in_kernel`,
    doubled after the sigmoid with `allow_neg_eigval`. States are `[N, H, K, V]` or, with
    `state_v_first`, `[N, H, V, K]`, one for each row or packed document. `scale` is `K ** -0.5`
    unless given. Computes in float32, in float64 for float64 input. Raises ValueError for
    shapes and flags that do not fit, NotImplementedError for context parallelism.
    """
    if cp_context is not None:
        raise NotImplementedError("context parallelism has no CPU path: leave cp_context out")
    state_v_first = state_layout(state_v_first, kwargs)
    beta = gate_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if kwargs.get("use_gate_in_kernel", False):
        g = log_decay(g, kwargs.get("A_log"), kwargs.get("dt_bias"))
    bounds = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    flags = (output_final_state, use_qk_l2norm_in_kernel)
    options = Options(scale, initial_state, *flags, bounds, state_v_first)
    return delta_rule(q, k, v, beta, g, options, given_chunk_size(kwargs))


def delta_rule(
    q: Float[Tensor, "B T Hk K"],
    k: Float[Tensor, "B T Hk K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    g: Float[Tensor, "B T H *K"] | None,
    options: Options,
    chunk_size: int | None = None,
    rule: ChunkedRule = chunked_delta_rule,
) -> tuple[Float[Tensor, "B T H V"], Tensor | None]:
    """Return outputs and final states (None unless asked for): the core of all operators.

    Args:
        beta: factors of the update, after any sigmoid.
        g: log-decays, or None for no decay.
        chunk_size: tokens a chunk; None chooses one by the documents' lengths.
        rule: what runs on chunks; KDA gives one with a decay per key channel.

    Raises:
        ValueError: shapes, document boundaries or chunk size do not fit.
    """
    lengths = document_lengths(q.shape[0], q.shape[1], options.cu_seqlens)
    _check(q, k, v, options.initial_state, len(lengths))
    layout = chunk_layout(lengths, chunk_size or _chunk_size(lengths), q.device)
    dtype = wide_dtype(q)
    if options.normalize:
        q, k = l2_normalize(q.to(dtype)), l2_normalize(k.to(dtype))
    scale = k.shape[-1] ** -0.5 if options.scale is None else options.scale
    groups = v.shape[2] // k.shape[2]
    parts = [to_chunks(x.to(dtype), layout) for x in (q * scale, k, v, beta)]
    gates = None if g is None else _mask(to_chunks(g, layout), layout)
    queries, keys = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in parts[:2])
    initial = _initial_state(options, layout, parts[2], keys)
    rate = _mask(parts[3], layout)
    out, final = rule(queries, keys, parts[2], rate, gates, initial, layout.alive)
    o = from_chunks(out, layout, v.shape).to(v.dtype)
    if not options.output_final_state:
        return o, None
    final = final.index_select(0, layout.rank)
    return o, final.transpose(-1, -2).contiguous() if options.state_v_first else final


def gate_beta(beta: Tensor, sigmoid: bool, allow_neg_eigval: bool) -> Tensor:
    """Apply a sigmoid to beta, and double it, if the flags ask for it.

    Doubling without the sigmoid raises ValueError.
    """
    if allow_neg_eigval and not sigmoid:
        raise ValueError("allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")
    if not sigmoid:
        return beta
    beta = beta.to(wide_dtype(beta)).sigmoid()
    return 2 * beta if allow_neg_eigval else beta


def log_decay(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    """Return `-exp(A_log) softplus(g + dt_bias)` in the shape of `g`, `[B, T, H]`."""
    if A_log is None:
        raise ValueError("use_gate_in_kernel=True needs A_log")
    dtype = wide_dtype(g)
    g = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * F.softplus(g)


def l2_normalize(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Return `x / sqrt(|x|^2 + 1e-6)` over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunk_size(lengths: tuple[int, ...]) -> int:
    """Return the chunk size: 32 was the fastest measured, 16 where padding would cost more."""
    return 32 if sum(lengths) > 32 * len(lengths) else 16


def given_chunk_size(kwargs: dict[str, Any]) -> int | None:
    """Return `chunk_size` of a caller's `kwargs`, None if it is not there.

    Raises:
        ValueError: no operator of fla has this size.
    """
    size = kwargs.get("chunk_size")
    if size is not None and size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size is {size}, must be one of {CHUNK_SIZES}")
    return size


def _mask(x: Float[Tensor, "chunks H C *K"], layout: ChunkLayout) -> Tensor:
    if not layout.padded:
        return x
    filled = layout.filled.view(layout.chunks, 1, layout.size, *[1] * (x.ndim - 3))
    return x.masked_fill(~filled, 0)


def _initial_state(
    options: Options, layout: ChunkLayout, v: Tensor, k: Tensor
) -> Float[Tensor, "N H K V"]:
    state = options.initial_state
    if state is None:
        return v.new_zeros(len(layout.order), v.shape[1], k.shape[-1], v.shape[-1])
    state = state.transpose(-1, -2) if options.state_v_first else state
    return state.to(v.dtype).index_select(0, layout.order)


def state_layout(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """Return the flag `state_v_first`, which `kwargs` may give by its old name, with a warning.

    Raises:
        ValueError: both names are given, or the removed `head_first`.
    """
    if "head_first" in kwargs:
        raise ValueError("head_first is gone: inputs are [B, T, H, ...]")
    if "transposestate_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ValueError("give state_v_first or its old name transposestate_layout, not both")
    message = "transposestate_layout is now state_v_first"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return bool(kwargs["transposestate_layout"])


def _check(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, documents: int) -> None:
    if q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}: must be the same")
    if v.shape[2] % k.shape[2]:
        raise ValueError(f"{v.shape[2]} value heads are no multiple of {k.shape[2]} key heads")
    if state is not None and state.shape[0] != documents:
        raise ValueError(f"{state.shape[0]} initial states for {documents} documents")
