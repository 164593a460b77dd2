"""fla's own Triton kernels under Triton's interpreter, as the measure of ours."""

import builtins
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton.language as tl
from fla.ops.common import chunk_delta_h, chunk_o
from fla.ops.delta_rule import wy_fast as delta_wy
from fla.ops.gated_delta_rule import wy_fast as gated_wy
from triton.runtime.autotuner import Autotuner

REPLACED = {
    chunk_delta_h: [
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
    ],
    chunk_o: ["chunk_fwd_kernel_o", "chunk_bwd_kernel_dv_local", "chunk_bwd_kernel_dqkwg"],
    delta_wy: ["recompute_w_u_fwd_kernel", "prepare_wy_repr_bwd_kernel"],
    gated_wy: ["recompute_w_u_fwd_kernel", "prepare_wy_repr_bwd_kernel"],
}
"""fla's kernels whose work grows with the key width, by module."""


@contextmanager
def kernels_of(owner: str) -> Iterator[None]:
    """Let fla's operators run on CPU tensors through our kernels, or through fla's alone.

    What is allocated holds NaN until it is written. With "slimstate" fla's kernels that ours
    replace are taken away, so that none of them can have run; autotuners take their first choice.
    """
    changes = [
        patch.dict(os.environ, SLIMSTATE_KERNELS=owner),
        patch.object(Autotuner, "do_bench", staticmethod(lambda *args, **kwargs: [0.0] * 3)),
        # In the interpreter a loop counts in Python's int; fla's kernel converts it by a method.
        patch.object(chunk_delta_h, "range", _tensor_range, create=True),
    ]
    if owner == "slimstate":
        changes += [patch.object(m, name, None) for m, names in REPLACED.items() for name in names]
    torch.use_deterministic_algorithms(True)
    try:
        for change in changes:
            change.start()
        yield
    finally:
        for change in changes:
            change.stop()
        torch.use_deterministic_algorithms(False)


def _tensor_range(*bounds: Any) -> Iterator[Any]:
    for i in builtins.range(*map(int, bounds)):
        yield tl.full([1], i, tl.int32)
