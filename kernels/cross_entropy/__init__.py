"""Cross entropy over a vocabulary, forward and backward, with the signatures of fla 0.6.0.

N tokens, V words, all on one rank. Loss and log-sum-exp are float32, or float64 for float64 logits.
A logit z is first scaled, then capped to `cap tanh(z / cap)`.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kernels.gated_delta_rule.chunk import wide_dtype

__all__ = ["cross_entropy_bwd", "cross_entropy_fwd", "fused_linear_cross_entropy_bwd"]


def cross_entropy_fwd(
    logits: Float[Tensor, "N V"],
    target: Int64[Tensor, " N"],
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    process_group: Any = None,
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Return loss, z-loss and log-sum-exp, `[N]` each, the number of classes, and the first class.

    Ignored targets have loss 0. A vocabulary spread over ranks raises NotImplementedError.
    """
    if process_group is not None and torch.distributed.get_world_size(process_group) > 1:
        raise NotImplementedError("a vocabulary spread over ranks has no CPU path")
    z = _transformed(logits, logit_scale, logit_softcapping)
    lse = z.logsumexp(-1)
    ignored = target == ignore_index
    chosen = z.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * chosen
    if label_smoothing:
        loss = loss - label_smoothing * z.mean(-1)
    z_loss = (lse_square_scale * lse.square()).masked_fill(ignored, 0)
    return loss.masked_fill(ignored, 0) + z_loss, z_loss, lse, logits.shape[1], 0


def cross_entropy_bwd(
    logits: Float[Tensor, "N V"],
    target: Int64[Tensor, " N"],
    lse: Float[Tensor, " N"],
    dloss: Float[Tensor, " N"],
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    total_classes: int | None = None,
    class_start_idx: int = 0,
    inplace_backward: bool = False,
) -> Float[Tensor, "N V"]:
    """Return the gradient of the logits, zero for ignored targets, in the dtype of the logits.

    `lse` is the forward's log-sum-exp and `dloss` the gradient of each token's loss.
    `inplace_backward` writes the result over the logits. `total_classes` and `class_start_idx`
    are not used: the vocabulary is on one rank.
    """
    z = _transformed(logits, logit_scale, logit_softcapping)
    factor = dloss.to(z.dtype).masked_fill(target == ignore_index, 0).unsqueeze(-1)
    spread = factor * (1 + 2 * lse_square_scale * lse).unsqueeze(-1)
    grad = (z - lse.unsqueeze(-1)).exp_().mul_(spread)
    if label_smoothing:
        grad.sub_(factor * (label_smoothing / logits.shape[1]))
    chosen = target.masked_fill(target == ignore_index, 0).unsqueeze(-1)
    grad.scatter_add_(-1, chosen, -(1 - label_smoothing) * factor)
    if logit_softcapping is not None:
        grad.mul_(1 - (z / logit_softcapping).square())
    if logit_scale != 1:
        grad.mul_(logit_scale)
    return logits.copy_(grad) if inplace_backward else grad.to(logits.dtype)


def fused_linear_cross_entropy_bwd(
    do: Tensor, dx: Tensor, dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients that the forward computed (dx, dw, db), each times the loss's `do`."""
    return dx * do, None if dw is None else dw * do, None if db is None else db * do


def _transformed(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    z = logits.to(wide_dtype(logits))
    z = z if scale == 1 else z * scale
    return z if cap is None else cap * torch.tanh(z / cap)
