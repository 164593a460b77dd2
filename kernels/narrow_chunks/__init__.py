"""The steps of fla's chunked delta rule for key widths between its blocks of 64, in Triton.

fla's kernels take 80 to 112 key channels as two blocks of 64; these multiply the channels that are
there, in multiples of 16. Each function has the name, the arguments and the results of the one of
fla 0.6.0 that it stands in for, so that fla's own autograd functions call either. What does not
grow with the key width stays fla's. `kernels/README.md` has the mathematics, the cost and what
`refusal` leaves to fla; the reference is `kernels.gated_delta_rule` in float64.
"""

from kernels.narrow_chunks.backward import (
    chunk_bwd_dqkwg,
    chunk_bwd_dv_local,
    chunk_gated_delta_rule_bwd_dhu,
    prepare_wy_repr_bwd,
)
from kernels.narrow_chunks.forward import (
    chunk_fwd_o,
    chunk_gated_delta_rule_fwd_h,
    recompute_w_u_fwd,
)
from kernels.narrow_chunks.pieces import pieces
from kernels.narrow_chunks.support import refusal

__all__ = [
    "chunk_bwd_dqkwg",
    "chunk_bwd_dv_local",
    "chunk_fwd_o",
    "chunk_gated_delta_rule_bwd_dhu",
    "chunk_gated_delta_rule_fwd_h",
    "pieces",
    "prepare_wy_repr_bwd",
    "recompute_w_u_fwd",
    "refusal",
]
