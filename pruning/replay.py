"""Replays: what a layer would give to its output projection if channels were zero.

The delta rule is run again on a call's own queries and keys with some key channels set to zero,
before their norm and at the dense model's scale, and what comes out goes through the layer's own
output norm and gate. So a replay is the masked dense layer on the dense model's inputs, which is
what a pruned layer is once its gain is undone (`pruning.planning.gain`). Everything after the
projections and convolutions is replayed, and they act on each channel by itself.

N tokens, H key heads with G value heads of V channels each, K key channels a head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.op_call import OpCall

NUMBERS_AT_ONCE = 2**25
"""Numbers of a block of replays: what the operator takes and gives, for all its channels."""

Operator = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Replay:
    """One layer's pass over some tokens, which can be repeated without single channels."""

    call: OpCall
    operator: Operator
    """What runs the family's calls (`pruning.taps.operator_for`)."""
    norm: nn.Module
    """The output norm; called with the delta rule's outputs and `gate`."""
    gate: tuple[Tensor, ...]
    """What the norm takes beside them: nothing, or the gate, with N · H · G rows of V."""
    weight: Float[Tensor, "hidden HGV"]
    """The output projection's."""
    outputs: Float[Tensor, "N HGV"]
    """What the layer gave to it."""

    @property
    def heads(self) -> int:
        """Key heads."""
        return self.call.q.shape[2]

    @property
    def group(self) -> int:
        """Value heads of a key head."""
        return self.call.v.shape[2] // self.heads

    @torch.no_grad()
    def without_key_channels(self, head: int) -> Float[Tensor, "K N GV"]:
        """What each of a head's key channels adds: outputs without it less those with all.

        Outputs are those of the head's value heads after norm and gate. Costs K + 1 runs of the
        operator on one head, in the dtype that the model ran in.
        """
        width = self.call.q.shape[3]
        with_all = self._outputs(head, self.call.q.new_ones(1, width))
        masks = 1 - torch.eye(width, dtype=with_all.dtype, device=with_all.device)
        a_channel = self.call.k.shape[:2].numel() * 2 * (width + self.group * self.call.v.shape[3])
        blocks = masks.split(max(NUMBERS_AT_ONCE // a_channel, 1))
        return torch.cat([self._outputs(head, block) - with_all for block in blocks])

    @torch.no_grad()
    def without_value_channels(self) -> Iterator[Float[Tensor, "V n HGV"]]:
        """What each value channel adds, in all heads together, for some tokens after others.

        Value channels do not see one another before the norm, so the delta rule runs once.
        """
        o = torch.cat([self._raw(h, self.call.q.new_ones(1, self.call.q.shape[3]))[0]
                       for h in range(self.heads)], 1)  # fmt: skip
        rows, width = o.shape[1:]
        gates = [gate.reshape(o.shape) for gate in self.gate]
        masks = 1 - torch.eye(width, dtype=o.dtype, device=o.device)
        step = max(NUMBERS_AT_ONCE // (rows * width * width), 1)
        for start in range(0, len(o), step):
            part = o[start : start + step]
            of_part = [gate[start : start + step] for gate in gates]
            with_all = self._normed(part[None], of_part)
            without = self._normed(part * masks[:, None, None, :], of_part)
            yield (without - with_all).flatten(2)

    def _outputs(self, head: int, masks: Float[Tensor, "c K"]) -> Float[Tensor, "c N GV"]:
        o = self._raw(head, masks)
        heads = slice(head * self.group, (head + 1) * self.group)
        shape = (-1, self.heads * self.group, o.shape[-1])
        return self._normed(o, [gate.reshape(shape)[:, heads] for gate in self.gate]).flatten(2)

    def _raw(self, head: int, masks: Float[Tensor, "c K"]) -> Float[Tensor, "c N G V"]:
        """The delta rule's outputs of a key head under each mask of its channels."""
        call, group = self.call, self.group
        of_values = slice(head * group, (head + 1) * group)
        q, k = (_masked(x[:, :, head], masks, call.normalizes) for x in (call.q, call.k))
        given = {"v": call.v, "beta": call.beta} | ({} if call.g is None else {"g": call.g})
        copies = {name: _repeated(x[:, :, of_values], len(masks)) for name, x in given.items()}
        bounds = None if call.cu_seqlens is None else call.cu_seqlens * call.steps
        o, _ = self.operator(
            q=_a_row_each(q, call.steps),
            k=k,
            **copies,
            use_qk_l2norm_in_kernel=call.normalizes,
            cu_seqlens=bounds,
        )
        # A token's output is that of its last row.
        of_tokens = o[:, call.steps - 1 :: call.steps].flatten(0, 1)
        return of_tokens.unflatten(1, (len(masks), group)).transpose(0, 1)

    def _normed(
        self, o: Float[Tensor, "c n h V"], gates: list[Float[Tensor, "n h V"]]
    ) -> Float[Tensor, "c n h V"]:
        given = [g.expand(o.shape).reshape(-1, o.shape[-1]) for g in gates]
        # Not by a call, which hooks on the norm would see.
        normed: Tensor = self.norm.forward(o.reshape(-1, o.shape[-1]).contiguous(), *given)
        return normed.view(o.shape)


def _masked(
    x: Float[Tensor, "B R K"], masks: Float[Tensor, "c K"], normalizes: bool
) -> Float[Tensor, "B R c K"]:
    """One head's queries or keys under each mask, as the operator takes them."""
    masked = x.unsqueeze(2) * masks.to(x.dtype)
    if normalizes:
        return masked.contiguous()
    return (masked / masked.sum(-1, keepdim=True)).to(x.dtype)


def _repeated(x: Float[Tensor, "B R G *rest"], count: int) -> Float[Tensor, "B R cG *rest"]:
    copies = x.unsqueeze(2).expand(*x.shape[:2], count, *x.shape[2:])
    return copies.flatten(2, 3).contiguous()


def _a_row_each(q: Float[Tensor, "B T c K"], steps: int) -> Float[Tensor, "B R c K"]:
    """Queries for every row of k: a token's in its last row, zeros in the others."""
    if steps == 1:
        return q
    spread = q.new_zeros(q.shape[0], q.shape[1], steps, *q.shape[2:])
    spread[:, :, -1] = q
    return spread.flatten(1, 2)
