"""Losses of tokens and their gradient, from the logits of one chunk.

The gradient of the cross entropy in the logits `z` is `p − e`, where `p = softmax(z)` and `e` is 1
at the label. That of T² · KL is `T (q − t)`, where `q = softmax(z / T)` and `t` is the teacher's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that has no loss."""


@dataclass(frozen=True)
class Mix:
    """Weights of `cross_entropy · CE + kl · T² · KL(teacher ‖ student)`, T the temperature."""

    cross_entropy: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0


PLAIN = Mix()
"""The cross entropy alone."""


class TokenLosses(NamedTuple):
    """Losses summed over a chunk, in float32 or wider, and their gradient."""

    cross_entropy: Tensor
    kl: Tensor
    """T² · KL; 0 without a teacher."""
    gradient: Tensor | None
    """Of the mixed loss in the logits, `[n, V]` in their dtype; None if it was not wanted."""


def chunk_losses(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix, with_gradient: bool
) -> TokenLosses:
    """Return `token_losses`, on CUDA by kernels that torch.compile fuses at the first call.

    `TORCH_COMPILE_DISABLE=1` makes them plain operators there too.
    """
    compute = _compiled() if logits.is_cuda else token_losses
    return compute(logits, labels, teacher, mix, with_gradient)


@cache
def _compiled() -> Callable[..., TokenLosses]:
    return torch.compile(token_losses)


def token_losses(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix, with_gradient: bool
) -> TokenLosses:
    """Return the losses of a chunk and their gradient.

    Args:
        logits: the student's, `[n, V]`.
        labels: `[n]`; at `IGNORE_INDEX` losses and gradient are 0.
        teacher: the teacher's logits, `[n, V]`, or None for no KL; may be overwritten.
    """
    ignored = labels == IGNORE_INDEX
    targets = labels.masked_fill(ignored, 0)[:, None]
    values = logits.to(wide(logits.dtype))
    gradient, log_sum = _softmax(values)
    picked = values.gather(1, targets) - log_sum
    cross_entropy = -picked.squeeze(1).masked_fill(ignored, 0).sum()
    at_target = mix.cross_entropy * (gradient.gather(1, targets) - 1)
    if mix.cross_entropy != 1:
        gradient *= mix.cross_entropy
    kl = torch.zeros_like(cross_entropy)
    if teacher is not None:
        divergence, slope = _divergence(values, teacher.to(values.dtype), mix.temperature)
        kl = divergence.masked_fill(ignored, 0).sum() * mix.temperature**2
        strength = mix.kl * mix.temperature
        at_target += strength * slope.gather(1, targets)
        gradient.add_(slope, alpha=strength)
    if not with_gradient:
        return TokenLosses(cross_entropy, kl, None)
    # A mask as an index would make the host wait for the GPU to count it.
    gradient.masked_fill_(ignored[:, None], 0)
    gradient = gradient.to(logits.dtype)
    # Rounded to bf16, `p` is 1 where the model is sure: the label's `p − 1` is put in afterwards.
    at_target = at_target.masked_fill(ignored[:, None], 0)
    gradient.scatter_(1, targets, at_target.to(gradient.dtype))
    return TokenLosses(cross_entropy, kl, gradient)


def _divergence(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return KL(teacher ‖ student) of each row, and the softmax of the student less the teacher's.

    Both are of logits over the temperature. The teacher's are overwritten.
    """
    own = logits / temperature
    slope, own_sum = _softmax(own)
    teacher.div_(temperature)
    told, told_sum = _softmax(teacher)
    slope.sub_(told)
    divergence = teacher.sub_(own).mul_(told).sum(-1)
    return divergence + (own_sum - told_sum).squeeze(1), slope


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax `[n, V]` of logits `z`, and `log Σ exp z` `[n, 1]`.

    The largest probability is one over the sum of `exp(z − max z)`, which saves a second pass of
    exponentials; no logarithm of a probability that underflows is taken.
    """
    if torch.compiler.is_compiling():
        # These fuse into what reads them, and no probability is stored.
        log_sum = logits.logsumexp(-1, keepdim=True)
        return (logits - log_sum).exp(), log_sum
    probabilities = logits.softmax(-1)
    largest = logits.amax(-1, keepdim=True)
    return probabilities, largest - probabilities.amax(-1, keepdim=True).log()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or `dtype` if it is wider."""
    return torch.promote_types(dtype, torch.float32)
