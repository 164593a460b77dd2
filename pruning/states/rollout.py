"""Recurrent states of a delta-rule call: the one place that makes them.

A tapped call has what entered the operator, so running the same operator over stretches of its
tokens gives the states at the ends of the stretches, for the cost of one pass over the tokens and
without another forward pass. What the operator normalises is normalised here too. On a CPU the
states are float64, made from the activations of the model.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruning.op_call import OpCall

EVERY = 128
"""Tokens of a document between two sampled states."""

Operator = Callable[..., tuple[Tensor, Tensor | None]]
"""A chunk operator for the delta rule: fla's signature, without `g` if the rule has no decay."""


def states_after(
    call: OpCall, operator: Operator, token_counts: Sequence[int]
) -> Iterator[Float[Tensor, "B HV K V"]]:
    """The states of the rows of a call after each of `token_counts` tokens, in that order.

    Args:
        call: a call in which each row is one document.
        operator: what runs the family's calls (`pruning.taps.operator_for`).
        token_counts: increasing numbers of tokens, at most those of a row.
    """
    inputs, state, start = _inputs(call), None, 0
    for count in token_counts:
        part = slice(start * call.steps, count * call.steps)
        segment = {name: x[:, part] for name, x in inputs.items()}
        state = _advance(call, operator, segment, state)
        yield state
        start = count


def sampled_states(
    call: OpCall, operator: Operator, every: int = EVERY
) -> Iterator[Float[Tensor, "n HV K V"]]:
    """The states after every `every`-th token of each document, and at its end.

    Documents may be packed (`cu_seqlens`). All that are long enough advance together, so the i-th
    tensor has a state for each document of more than (i - 1) · `every` tokens.
    """
    starts, ends = _documents(call)
    packed = {name: x.flatten(0, 1)[None] for name, x in _inputs(call).items()}
    state: Tensor | None = None
    while len(starts):
        stops = torch.minimum(starts + every * call.steps, ends)
        parts = zip(starts.tolist(), stops.tolist(), strict=True)
        chosen = torch.cat([torch.arange(start, stop) for start, stop in parts]).to(call.v.device)
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), (stops - starts).cumsum(0)])
        segment = {name: x[:, chosen] for name, x in packed.items()}
        state = _advance(call, operator, segment, state, cu_seqlens=bounds.to(call.v.device))
        yield state
        going = stops < ends
        starts, ends, state = stops[going], ends[going], _rows(state, going)


def _inputs(call: OpCall) -> dict[str, Tensor]:
    """The operator's arguments but q, which states do not depend on; float64 on a CPU."""
    given = {"k": call.k if call.given_k is None else call.given_k, "v": call.v, "beta": call.beta}
    if call.g is not None:
        given["g"] = call.g
    if call.v.device.type == "cpu":
        given = {name: x.double() for name, x in given.items()}
    return given


def _advance(
    call: OpCall,
    operator: Operator,
    segment: dict[str, Tensor],
    state: Tensor | None,
    **bounds: Tensor,
) -> Tensor:
    """The states at the end of a stretch of tokens that begins in `state`."""
    _, after = operator(
        q=segment["k"].contiguous(),
        **{name: x.contiguous() for name, x in segment.items()},
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=call.normalizes,
        **bounds,
    )
    assert after is not None
    return after


def _documents(call: OpCall) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Where the documents start and end in the flattened rows; empty ones are left out."""
    rows, length = call.v.shape[:2]
    bounds = torch.arange(0, rows * length + 1, length)
    if call.cu_seqlens is not None:
        bounds = call.cu_seqlens.cpu().long() * call.steps
    starts, ends = bounds[:-1], bounds[1:]
    return starts[ends > starts], ends[ends > starts]


def _rows(state: Tensor, chosen: Bool[Tensor, " n"]) -> Tensor:
    return state[chosen.to(state.device)].contiguous()
