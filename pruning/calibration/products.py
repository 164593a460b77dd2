"""How a calibration sums outer products: in float64, or in short pieces on slow devices."""

from typing import Literal

import torch
from torch import Tensor

from pruning.statistics.products import AddProducts, add_products_, add_products_in_pieces_

Products = Literal["auto", "float64", "pieces"]

FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of NVIDIA GPUs that do half as many float64 as float32 operations a cycle:
P100, V100, A100, H100 and H200, B200. The others do a 32nd or a 64th, B300 (10.3) among them.
Source: the table "Throughput of Native Arithmetic Instructions" of NVIDIA's CUDA C++ Programming
Guide."""


def products_for(device: torch.device, products: Products = "auto") -> AddProducts:
    """Return the function with which statistics on `device` sum outer products.

    Args:
        products: `float64` or `pieces` on every device; `auto` takes pieces on GPUs that are slow
            at float64. AMD's data-centre GPUs are fast at it, as CPUs are.
    """
    if products == "auto":
        products = "float64" if _is_fast_at_float64(device) else "pieces"
    return add_products_ if products == "float64" else add_in_pieces_


def add_in_pieces_(gram: Tensor, *rows: Tensor) -> None:
    """Add the outer products of rows in short pieces, by our Triton kernel where it takes them."""
    from kernels.gram import gram_matrices, takes

    if takes(*rows):
        gram += gram_matrices(*rows)
    else:
        add_products_in_pieces_(gram, *rows)


def _is_fast_at_float64(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(device) in FAST_FLOAT64
