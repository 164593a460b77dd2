"""One token of a delta-rule layer, from its projections to its gated output, in one launch."""

from kernels.decode_step.reference import reference_step
from kernels.decode_step.step import Convolution, Decay, DecodeStep, Output
from kernels.decode_step.triton_step import decode_step, refusal

__all__ = [
    "Convolution",
    "Decay",
    "DecodeStep",
    "Output",
    "decode_step",
    "reference_step",
    "refusal",
]
