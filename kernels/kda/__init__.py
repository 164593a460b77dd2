"""Kimi Delta Attention (arXiv 2510.26692): the delta rule with one decay per key channel."""

from kernels.kda.chunk import chunk_kda, fused_recurrent_kda
from kernels.kda.gate import fused_kda_gate

__all__ = ["chunk_kda", "fused_kda_gate", "fused_recurrent_kda"]
