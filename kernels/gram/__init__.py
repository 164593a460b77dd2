"""Gram matrices of queries and keys per head, in one pass over the delta rule's inputs."""

from kernels.gram.pieces import gram_matrices, takes

__all__ = ["gram_matrices", "takes"]
