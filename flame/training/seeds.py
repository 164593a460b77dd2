"""Random draws of a training step, which a resumed run must repeat."""

import hashlib

import torch

from flame.process.distributed import rank


def seed_step(seed: int, step: int) -> None:
    """Seed this rank's generators for `step`: dropout draws the same whether or not it resumed.

    The draws differ from rank to rank, so a run repeats bit for bit at the same world size.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
