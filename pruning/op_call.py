"""One call of the delta rule, as the mathematics has it: statistics and states are made from it."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_NAMES = {"query": "q", "key": "k", "value": "v"}
"""Transformers' names of the operator's arguments, and fla's."""


@dataclass
class OpCall:
    """One call of the delta rule, as the mathematics has it, whatever the kernel fuses.

    Tensors are detached and in the model's dtype. Packed documents come as one row (B = 1) with
    their boundaries in `cu_seqlens`; padding has been taken out by the layer where it was given
    an attention mask.

    A delta product writes `steps` times for each token: it is unrolled here, so that k, v, beta and
    g have `steps` rows a token, R = T * steps, as the delta rule would take them. The first row of
    a token has its decay, the others none.
    """

    layer: int
    q: Float[Tensor, "B T H K"]
    """Queries after convolution and activation, before any normalisation."""
    k: Float[Tensor, "B R H K"]
    """Keys after convolution and activation, before any normalisation."""
    v: Float[Tensor, "B R HV V"]
    """Values after convolution and activation."""
    beta: Float[Tensor, "B R HV"]
    """Writing strengths, after the sigmoid and the factor 2 of negative eigenvalues."""
    g: Float[Tensor, "B R HV *K"] | None
    """Log-decays, at most 0, of heads or of key channels; None for a rule without decay."""
    cu_seqlens: Int[Tensor, " n"] | None
    """Document boundaries along T, from 0 to T."""
    given_k: Float[Tensor, "B R H K"] | None = None
    """Keys as the operator takes them: `k`, or `k` divided by its sum."""
    normalizes: bool = True
    """Whether the operator divides `given_k` by its L2 norm."""
    steps: int = 1
    """Rows of k for each token."""
    sampled: tuple[Int[Tensor, " nq"], Int[Tensor, " nk"]] | None = None
    """The tokens whose query and whose key belong to a random subset; None for all of them."""
    heads: tuple[int, ...] | None = None
    """The value heads of the call in a layer that makes several, one a key width; None for all."""

    @property
    def tokens(self) -> int:
        """Tokens of the call, B · T."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def decay(self) -> Float[Tensor, "B T HV"]:
        """The decay of each token, at most 1; the mean of its channels where each has its own."""
        if self.g is None:
            return torch.ones_like(self.strength)
        decay = self.g[:, :: self.steps].double().exp()
        return decay if decay.ndim == 3 else decay.mean(-1)

    @property
    def strength(self) -> Float[Tensor, "B T HV"]:
        """The mean writing strength of each token's steps."""
        return self.beta.unflatten(1, (-1, self.steps)).mean(2)


def unroll_(call: OpCall, steps: int) -> None:
    """Change a delta product's call in place to the form of `OpCall`: q a token, g a row of k.

    A token has `steps` rows of k, v and beta. The chunk operator takes q and g a token. The
    recurrent one takes both a row, q in the last row of a token and g in the first, and its
    `cu_seqlens` count rows; afterwards they count tokens. Without a gate g becomes zeros.
    """
    call.steps = steps
    if call.g is None:
        call.g = torch.zeros_like(call.beta, dtype=torch.float32)
    if call.q.shape[1] == call.k.shape[1]:
        call.q = call.q[:, steps - 1 :: steps]
        if call.cu_seqlens is not None:
            call.cu_seqlens = call.cu_seqlens // steps
    if call.g.shape[1] < call.k.shape[1]:
        spread = call.g.new_zeros(*call.g.shape[:2], steps, call.g.shape[2])
        spread[:, :, 0] = call.g
        call.g = spread.flatten(1, 2)


def arguments_by_name(
    signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments by name, those that the operator takes by **kwargs among them."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return {_NAMES.get(name, name): value for name, value in arguments.items()}


def writing_strength(arguments: dict[str, Any]) -> Tensor:
    """The beta of an operator's arguments, after the sigmoid and doubling that they ask for."""
    beta = arguments["beta"].detach()
    if not arguments.get("use_beta_sigmoid_in_kernel", False):
        return beta
    return beta.sigmoid() * (2.0 if arguments.get("allow_neg_eigval", False) else 1.0)


def log_decay(arguments: dict[str, Any]) -> Tensor | None:
    """The log-decays of an operator's arguments, after the gate that they ask for."""
    g = arguments.get("g")
    if g is None or not arguments.get("use_gate_in_kernel", False):
        return None if g is None else g.detach()
    g, bias, bound = g.float(), arguments.get("dt_bias"), arguments.get("lower_bound")
    if bias is not None:
        g = g + bias.float().view(g.shape[2:])
    rate = g.new_ones(1) if arguments.get("A_log") is None else arguments["A_log"].float().exp()
    rate = rate.view(-1, *[1] * (g.ndim - 3))
    return -rate * F.softplus(g) if bound is None else bound * (rate * g).sigmoid()
