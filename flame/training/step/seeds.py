"""Seeding each training step, so that a resumed run draws what an uninterrupted one would."""

import hashlib

import torch

from flame.process.distributed import rank


def seed_step(seed: int, step: int) -> None:
    """Seed this rank's generators by `seed`, `step` and rank, for dropout.

    Draws depend on the rank, so a run repeats bit for bit only at the same world size.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
