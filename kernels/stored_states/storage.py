"""How an engine stores a recurrent state between two tokens, and what that costs in bytes.

    x = S + e        y = Q(x)        e' = R(x - y)

S is the state after a token's update, in float32; Q rounds it to what is stored, and y is what the
next token reads. Without feedback e is zero. With it (sigma-delta modulation), the error that Q
made is kept in a few bits of its own, R, and added before the next rounding, so that errors do not
add up over the tokens: where the rule keeps S as it is, all that is lost is the last one. The rule
itself, and so the output, reads y alone.

The scaled dtypes, float8 (e4m3) and int8, divide by a float32 scale, amax / 448 and amax / 127. A
scale serves a row, the key channels of one value channel (vLLM, pull requests 40012 and 52962), or
a tile, those of 32 value channels (SGLang, issue 40706, which leaves float8 more room above). For
int8 with an int4 residual see vLLM, issue 55196; for float16 and the sum, warpfront/hipfire, 392.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

StateDType = Literal["float32", "bfloat16", "float16", "float8", "int8"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}

SCALED = {"float8": 448.0, "int8": 127.0}
"""The largest number of the dtypes that need scales."""

LARGEST_ERROR = {"float8": 16.0, "int8": 0.5}
"""Half the distance of two neighbours at the largest number: rounding loses no more."""

SCALE_BYTES = 4
TILE = 32
"""Value channels that share a scale where scales are of tiles."""

INT4 = 7.0
"""The largest number of a residual of four bits."""

Store = Callable[[Float[Tensor, "rows K V"]], None]
"""Replaces states by what is read back of them. Rows are documents by heads; a later call of one
`Store` has the first rows of an earlier one."""


@dataclass(frozen=True)
class StateStorage:
    """A format of stored states."""

    dtype: StateDType
    scales: Literal["row", "tile"] = "row"
    """What shares a scale; float8 and int8 alone have any."""
    residual: Literal["int4", "float16"] | None = None
    """What keeps the rounding error, for float8 and int8; an int4 shares the state's scale."""

    def bytes(self, heads: int, key_width: int, value_width: int) -> int:
        """Bytes of `heads` states of `key_width` x `value_width`: numbers, scales and residual."""
        numbers = heads * key_width * value_width
        size = numbers * DTYPES[self.dtype].itemsize
        if self.dtype in SCALED:
            size += heads * -(-value_width // self._channels_a_scale) * SCALE_BYTES
        if self.residual == "int4":
            # Two residuals share a byte within a row.
            size += heads * value_width * -(-key_width // 2)
        return size + (2 * numbers if self.residual == "float16" else 0)

    def store(self) -> Store | None:
        """What stores the states of one call of the operator; None where nothing is lost."""
        if self.dtype == "float32":
            return None
        if self.dtype not in SCALED:
            return self._cast_
        return self._round_ if self.residual is None else _Feedback(self)

    @property
    def _channels_a_scale(self) -> int:
        return 1 if self.scales == "row" else TILE

    def _cast_(self, states: Float[Tensor, "rows K V"]) -> None:
        states.copy_(states.to(DTYPES[self.dtype]))

    def _round_(self, states: Float[Tensor, "rows K V"]) -> Float[Tensor, "rows 1 V"]:
        """Replace states by what is read back; return the scale of each value channel."""
        scale = self._scale(states)
        states.div_(scale)
        if self.dtype == "int8":
            states.round_()
        else:
            states.copy_(states.to(torch.float8_e4m3fn))
        states.mul_(scale)
        return scale

    def _scale(self, states: Float[Tensor, "rows K V"]) -> Float[Tensor, "rows 1 V"]:
        largest = states.abs().amax(1, keepdim=True)
        shared, width = self._channels_a_scale, states.shape[-1]
        if shared > 1:
            tiles = F.pad(largest, (0, -width % shared)).unflatten(-1, (-1, shared)).amax(-1)
            largest = tiles.repeat_interleave(shared, -1)[..., :width]
        # A state of zeros has no scale of its own; any will do.
        return largest.div_(SCALED[self.dtype]).clamp_min_(torch.finfo(states.dtype).tiny)


class _Feedback:
    """A `Store` that keeps the rounding errors of its states for their next rounding."""

    def __init__(self, storage: StateStorage) -> None:
        self.storage = storage
        self.residual: Tensor | None = None

    def __call__(self, states: Float[Tensor, "rows K V"]) -> None:
        residual = self.residual if self.residual is not None else torch.zeros_like(states)
        # Documents that have ended are the last rows.
        residual = residual[: len(states)]
        wanted = states.add_(residual).clone()
        scale = self.storage._round_(states)
        self.residual = self._kept(torch.sub(wanted, states, out=residual), scale)

    def _kept(self, error: Tensor, scale: Tensor) -> Tensor:
        if self.storage.residual == "float16":
            return error.copy_(error.half())
        step = scale * (LARGEST_ERROR[self.storage.dtype] / INT4)
        return error.div_(step).round_().clamp_(-INT4, INT4).mul_(step)
