"""Short depthwise convolutions whose channels share their kernels.

If all channels of a head have one kernel, the convolution commutes with every linear map of the
head's channels, so a rotation of the keys can be moved from behind it into the projection.
"""

import math
from typing import Any, Literal

import torch
from fla.modules.causal_conv1d import ops as fla_convolution
from jaxtyping import Float
from torch import Tensor, nn

Sharing = Literal["layer", "head", "channel"]
SHARINGS: tuple[Sharing, ...] = ("layer", "head", "channel")


class SharedConvolution(nn.Module):
    """A causal convolution with `kernels` kernels of `width` taps for any number of channels.

    Each kernel serves an equal share of neighbouring channels. The number of channels is the
    input's, so k and v can go through one convolution. The weight is `[kernels, 1, width]`; its
    last tap multiplies the token itself.
    """

    def __init__(self, kernels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernels, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight uniformly from ±1/√width, as torch does for a depthwise convolution."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def taps(self) -> Float[Tensor, "kernels W"]:
        """The kernels, oldest token first."""
        return self.weight.squeeze(1)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        activation: str | None,
        cache: Float[Tensor, "N D W"] | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "N D W"] | None]:
        """Convolve along T and apply `activation` (`silu` or None).

        Args:
            cache: the last W inputs of each of N documents. It is updated in place if each document
                has one token and no gradient is recorded.
            cu_seqlens: boundaries of documents packed in one row (B = 1).

        Returns:
            The outputs, and the new cache if `output_final_state` or the update was in place.
        """
        taps = self.taps()
        weight = taps.repeat_interleave(x.shape[-1] // taps.shape[0], 0)
        options: dict[str, Any] = {"weight": weight, "activation": activation}
        documents = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        alone = x.shape[0] * x.shape[1] == documents and not torch.is_grad_enabled()
        if cache is not None and alone:
            return fla_convolution.causal_conv1d_update(x=x, cache=cache, **options)
        return fla_convolution.causal_conv1d(
            x=x,
            initial_state=cache,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            **options,
        )


class TokenShift(SharedConvolution):
    """Mixes each token with the one before it: `y_t = (1 − μ) x_t + μ x_{t−1}`.

    Each share of the channels has one learned μ, the only weight (`[kernels, 1, 1]`). It starts at
    1/2 and may leave [0, 1].
    """

    def __init__(self, kernels: int) -> None:
        super().__init__(kernels, 1)

    def reset_parameters(self) -> None:
        """Set every μ to 1/2."""
        nn.init.constant_(self.weight, 0.5)

    def taps(self) -> Float[Tensor, "kernels 2"]:
        """The kernels `(μ, 1 − μ)`."""
        shift = self.weight.squeeze(1)
        return torch.cat([shift, 1 - shift], dim=1)
