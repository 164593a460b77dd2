"""Recurrent states sampled along the documents of a delta-rule call."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruning.state_rank import Operator
from pruning.taps import OpCall

EVERY = 128
"""Tokens of a document between two states."""


def sampled_states(
    call: OpCall, operator: Operator, every: int = EVERY
) -> Iterator[Float[Tensor, "n HV K V"]]:
    """The states after every `every`-th token of each document, and at its end.

    The operator runs over one segment of all documents that are long enough at a time, from their
    states after the segment before: the cost is one pass over the tokens. On a CPU it computes in
    float64, from the activations of the model.
    """
    starts, ends = _documents(call)
    inputs = _inputs(call)
    state: Tensor | None = None
    while len(starts):
        stops = torch.minimum(starts + every * call.steps, ends)
        state = _advance(operator, inputs, starts, stops, state, call.normalizes)
        yield state
        going = stops < ends
        starts, ends, state = stops[going], ends[going], _rows(state, going)


def _documents(call: OpCall) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Where the documents start and end in the flattened rows; empty ones are left out."""
    rows, length = call.v.shape[:2]
    bounds = torch.arange(0, rows * length + 1, length)
    if call.cu_seqlens is not None:
        bounds = call.cu_seqlens.cpu().long() * call.steps
    starts, ends = bounds[:-1], bounds[1:]
    return starts[ends > starts], ends[ends > starts]


def _inputs(call: OpCall) -> dict[str, Tensor]:
    """The operator's arguments but q, which states do not depend on, as one packed row."""
    given = {"k": call.k if call.given_k is None else call.given_k, "v": call.v, "beta": call.beta}
    if call.g is not None:
        given["g"] = call.g
    packed = {name: x.flatten(0, 1)[None] for name, x in given.items()}
    if call.v.device.type == "cpu":
        packed = {name: x.double() for name, x in packed.items()}
    return packed


def _advance(
    operator: Operator,
    inputs: dict[str, Tensor],
    starts: Int[Tensor, " n"],
    stops: Int[Tensor, " n"],
    state: Tensor | None,
    normalize: bool,
) -> Float[Tensor, "n HV K V"]:
    parts = zip(starts.tolist(), stops.tolist(), strict=True)
    chosen = torch.cat([torch.arange(start, stop) for start, stop in parts])
    device = inputs["v"].device
    segment = {name: x[:, chosen.to(device)] for name, x in inputs.items()}
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), (stops - starts).cumsum(0)])
    _, after = operator(
        q=segment["k"],
        **segment,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalize,
        cu_seqlens=bounds.to(device),
    )
    assert after is not None
    return after


def _rows(state: Tensor, chosen: Bool[Tensor, " n"]) -> Tensor:
    return state[chosen.to(state.device)].contiguous()
