"""Whether our Triton kernels may run on given tensors, and the switch that forces fla's instead.

`SLIMSTATE_KERNELS=fla` leaves an accelerator's tensors to fla's own kernels; unset, or `slimstate`,
ours run wherever a shape and its flags are ours. It is read at every call.

Under Triton's interpreter (`TRITON_INTERPRET=1` before triton is first imported) the same kernels,
and fla's, run on CPU tensors. It is slow; the tests use it.
"""

import os

import triton
import triton.language as tl
from torch import Tensor

VARIABLE = "SLIMSTATE_KERNELS"
CHOICES = ("slimstate", "fla")

# Triton's own functions were made by the same switch as ours, so they say what it was when triton
# was imported; kernels decorated under another setting could not call them.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
"""Whether kernels are run by Triton's interpreter in this process."""


def chosen() -> str:
    """Return what `SLIMSTATE_KERNELS` asks for, one of `CHOICES`; ValueError for any other."""
    choice = os.environ.get(VARIABLE) or CHOICES[0]
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE}={choice}: known are {', '.join(CHOICES)}")
    return choice


def runs_on(*tensors: Tensor | None) -> bool:
    """Return whether our Triton kernels run on these tensors, all on one device; None is skipped.

    False without a tensor, if `SLIMSTATE_KERNELS=fla`, and on CPU tensors unless interpreted.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1 or chosen() == "fla":
        return False
    kind = devices.pop().type
    return kind == "cuda" or (kind == "cpu" and INTERPRETED)
