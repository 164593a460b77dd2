"""Multiplying a gradient by the scale that comes from behind it."""

import torch
from torch import Tensor

AT_A_TIME = 2**24
"""Numbers that are held in the wider dtype together; 64 MiB in fp32."""


def scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """Return `tensor · scale` in the dtype of `tensor`, where `scale` is a wider scalar.

    Rounded to bf16, the scale and with it the whole gradient would be off by up to 1/256. At most
    `AT_A_TIME` numbers are held in the wider dtype.
    """
    if tensor.dtype == scale.dtype:
        return tensor * scale
    result = torch.empty_like(tensor)
    rows = max(1, AT_A_TIME * tensor.shape[0] // tensor.numel())
    for own, part in zip(tensor.split(rows), result.split(rows), strict=True):
        torch.mul(own.to(scale.dtype), scale, out=part)
    return result
