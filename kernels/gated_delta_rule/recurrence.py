"""The only sequential part of the chunked delta rule: the state that passes between chunks.

    V_new[c] = U[c] - W[c] S[c],     R[c] = Q[c] S[c]
    S[c+1]   = gamma[c] S[c] + Kd[c]^T V_new[c]

A step is three products forward and three backward, all while the state lies in the cache. Tensors
are `[chunks, H, ...]` with the chunks in the order of a `ChunkLayout`, whose `alive` counts the
documents that each step advances. Q are the queries times the decay from the start of the chunk
(`q_start`), Kd the keys times their decay to its end (`k_end`), gamma the decay over the chunk.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Carried(NamedTuple):
    """What the recurrence gives."""

    v_new: Float[Tensor, "chunks H C V"]
    read: Float[Tensor, "chunks H C V"]
    """What the queries read from the state before their chunk."""
    states: Float[Tensor, "chunks H K V"]
    """The state before each chunk."""
    final: Float[Tensor, "N H K V"]


Carry = Callable[..., Carried]
"""Runs the recurrence, with the arguments of `carry_states`."""


def carry_states(
    u: Float[Tensor, "chunks H C V"],
    w: Float[Tensor, "chunks H C K"],
    q_start: Float[Tensor, "chunks H C K"],
    k_end: Float[Tensor, "chunks H C K"],
    gamma: Float[Tensor, "chunks H *K 1"] | None,
    initial: Float[Tensor, "N H K V"],
    alive: tuple[int, ...],
) -> Carried:
    """Run the recurrence.

    `initial` and the final states are in the layout's order of documents. `gamma` None means that
    nothing decays.
    """
    states = initial.new_empty(*u.shape[:2], *initial.shape[2:])
    v_new, read = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(2))
    final = initial.clone(memory_format=torch.contiguous_format)
    ends, befores = final.flatten(0, 1), _steps(states, alive)
    cut = [_steps(x, alive) for x in (u, w, q_start, k_end.mT, v_new, read)]
    decays = _decays(gamma, alive)
    for i, (value, key, query, write, new, out) in enumerate(zip(*cut, strict=True)):
        state = befores[i]
        if i == 0 or len(befores[i - 1]) != len(state):
            state.copy_(ends[: len(state)])
        torch.baddbmm(value, key, state, alpha=-1, out=new)
        torch.bmm(query, state, out=out)
        # Where no document ends, the next state is made in its place; else in the final states.
        goes_on = i + 1 < len(befores) and len(befores[i + 1]) == len(state)
        after = befores[i + 1] if goes_on else ends[: len(state)]
        _decay(state, decays[i], after)
        after.baddbmm_(write, new)
    return Carried(v_new, read, states, final)


def carry_stored(
    u: Float[Tensor, "chunks H C V"],
    w: Float[Tensor, "chunks H C K"],
    q_start: Float[Tensor, "chunks H C K"],
    k_end: Float[Tensor, "chunks H C K"],
    gamma: Float[Tensor, "chunks H *K 1"] | None,
    initial: Float[Tensor, "N H K V"],
    alive: tuple[int, ...],
    store: Callable[[Tensor], object] | None = None,
) -> Carried:
    """Run the recurrence forward alone, each state passing through `store` at its chunk's end.

    `store` changes states `[documents * H, K, V]` in place. The states before chunks, which only a
    backward pass reads, are not kept: they are empty.
    """
    v_new, read = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(2))
    final = initial.clone(memory_format=torch.contiguous_format)
    cut = [_steps(x, alive) for x in (u, w, q_start, k_end.mT, v_new, read)]
    for *parts, decay in zip(*cut, _decays(gamma, alive), strict=True):
        value, key, query, write, new, out = parts
        state = final.flatten(0, 1)[: len(value)]
        torch.baddbmm(value, key, state, alpha=-1, out=new)
        torch.bmm(query, state, out=out)
        _decay(state, decay, state)
        state.baddbmm_(write, new)
        if store is not None:
            store(state)
    return Carried(v_new, read, initial.new_empty(0), final)


def carry_gradients(
    dv_new: Float[Tensor, "chunks H C V"],
    dread: Float[Tensor, "chunks H C V"],
    w: Float[Tensor, "chunks H C K"],
    q_start: Float[Tensor, "chunks H C K"],
    k_end: Float[Tensor, "chunks H C K"],
    gamma: Float[Tensor, "chunks H *K 1"] | None,
    dfinal: Float[Tensor, "N H K V"],
    alive: tuple[int, ...],
) -> tuple[Float[Tensor, "chunks H K V"], Float[Tensor, "N H K V"]]:
    """Return the gradients of the state after each chunk and of the initial states.

    `dv_new` are V_new's gradients within its chunk. What later chunks give is added in place; they
    are then U's gradients too.
    """
    dafter = dfinal.new_empty(*dv_new.shape[:2], *dfinal.shape[2:])
    dinitial = dfinal.clone(memory_format=torch.contiguous_format)
    ends, afters = dinitial.flatten(0, 1), _steps(dafter, alive)
    cut = [_steps(x, alive) for x in (dv_new, dread, w.mT, q_start.mT, k_end)]
    decays = _decays(gamma, alive)
    for i, (dnew, dout, key, query, write) in reversed(list(enumerate(zip(*cut, strict=True)))):
        after = afters[i]
        if i + 1 == len(afters) or len(afters[i + 1]) != len(after):
            after.copy_(ends[: len(after)])
        dnew.baddbmm_(write, after)
        goes_on = i > 0 and len(afters[i - 1]) == len(after)
        before = afters[i - 1] if goes_on else ends[: len(after)]
        _decay(after, decays[i], before)
        before.baddbmm_(query, dout)
        before.baddbmm_(key, dnew, alpha=-1)
    return dafter, dinitial


def _steps(x: Tensor, alive: tuple[int, ...]) -> Sequence[Tensor]:
    """Cut `[chunks, H, ...]` into the steps of the recurrence, `[documents * H, ...]`."""
    return x.flatten(0, 1).split([documents * x.shape[1] for documents in alive])


def _decays(gamma: Tensor | None, alive: tuple[int, ...]) -> Sequence[Tensor | None]:
    return [None] * len(alive) if gamma is None else _steps(gamma, alive)


def _decay(state: Tensor, gamma: Tensor | None, out: Tensor) -> None:
    out.copy_(state) if gamma is None else torch.mul(state, gamma, out=out)
