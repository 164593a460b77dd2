"""The base of our token mixers: one delta-rule call for each distinct key width.

Parameters have the names and the row order of fla's layers, so pruning makes them by slicing. Heads
of equal key width share a call; if all heads agree, the layer makes the one call of fla's layer on
the same tensors. If they do not, the cached state is a tuple of one tensor per width, the narrowest
first; fla's cache reorders, repeats and selects such a tuple as it does a tensor.

B rows of T tokens; H key heads, each with G value heads of width V.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from fla.layers.utils import (
    get_layer_cache,
    repad_hidden_states,
    unpad_hidden_states,
    update_layer_cache,
)
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from jaxtyping import Float
from torch import Tensor, nn

from flame.models.head_groups import gather_heads, gather_keys, head_groups, merge_heads
from flame.models.widths import KERNEL_WIDTHS, LayerWidths

RECURRENT_TOKENS = 64
"""fla's layers run the recurrent operator on inputs of at most this many tokens."""

State: TypeAlias = Tensor | tuple[Tensor, ...] | None


class DeltaRuleMixer(nn.Module):
    """A delta-rule layer with a key width for each key head; subclasses say which rule it runs."""

    def __init__(self, config: Any, layer_idx: int, widths: LayerWidths) -> None:
        super().__init__()
        self.layer_idx, self.widths = layer_idx, widths
        self.groups = head_groups(widths.keys)
        self.num_heads, self.num_v_heads = widths.heads, widths.value_heads
        self.mode, self.hidden_size = config.attn_mode, config.hidden_size
        self.use_short_conv, self.use_gate = config.use_short_conv, config.use_gate
        self.allow_neg_eigval = config.allow_neg_eigval
        rows = {"q": widths.key_rows, "k": widths.key_rows, "v": widths.value_rows}
        for name, size in rows.items():
            setattr(self, f"{name}_proj", nn.Linear(self.hidden_size, size, bias=False))
        self.add_gates(config)
        if self.use_short_conv:
            self.add_convolutions(config, rows)
        self._add_output(config)

    def _add_output(self, config: Any) -> None:
        rows, width = self.widths.value_rows, self.widths.value
        if self.use_gate:
            self.g_proj = nn.Linear(self.hidden_size, rows, bias=False)
            self.o_norm = self.gated_norm(config)
        else:
            self.o_norm = RMSNorm(width, eps=self.output_eps(config), dtype=torch.float32)
        self.o_proj = nn.Linear(rows, self.hidden_size, bias=False)

    @property
    def heads_of_calls(self) -> list[tuple[int, ...]]:
        """The value heads that each call of the delta rule takes; empty if one call takes all."""
        if len(self.groups) == 1:
            return []
        size = self.widths.group
        return [tuple(h * size + i for h in group for i in range(size)) for group in self.groups]

    def add_convolutions(self, config: Any, rows: Mapping[str, int]) -> None:
        """Make the convolutions of q, k and v; `rows` gives the channels of each."""
        for name, size in rows.items():
            activation = self.convolution_activation(name)
            convolution = ShortConvolution(size, config.conv_size, activation=activation)
            setattr(self, f"{name}_conv1d", convolution)

    def convolve(
        self, name: str, x: Float[Tensor, "B T rows"], cache: Tensor | None, **options: Any
    ) -> tuple[Float[Tensor, "B T rows"], Tensor | None]:
        """Convolve q, k or v and apply `convolution_activation`.

        Args:
            name: `q`, `k` or `v`.
            cache: the convolution's state, or None.
            options: `output_final_state` and `cu_seqlens`.

        Returns:
            The result, and the new state if `output_final_state` (else None).
        """
        return getattr(self, f"{name}_conv1d")(x=x, cache=cache, **options)

    def output_eps(self, config: Any) -> float:
        """The eps of the output norm."""
        return float(config.norm_eps * self.widths.norm_eps_factor)

    def gated_norm(self, config: Any) -> nn.Module:
        """The output norm of a layer with an output gate."""
        return FusedRMSNormGated(self.widths.value, eps=self.output_eps(config))

    @abstractmethod
    def add_gates(self, config: Any) -> None:
        """Make the parameters of beta and, for a gated rule, of the decay."""

    @abstractmethod
    def convolution_activation(self, name: str) -> str | None:
        """The activation that the convolution of `q`, `k` or `v` applies, or None."""

    @abstractmethod
    def activate(self, name: str, x: Tensor) -> Tensor:
        """Apply the activation that the convolution of `q`, `k` or `v` has not applied."""

    @abstractmethod
    def gates(self, x: Float[Tensor, "B T hidden"]) -> Mapping[str, Tensor]:
        """The operator's arguments with one entry a value head, which is their last dimension."""

    @abstractmethod
    def operate(
        self, recurrent: bool, q: Tensor, k: Tensor, v: Tensor, **arguments: Any
    ) -> tuple[Float[Tensor, "B T HG V"], Tensor | None]:
        """Run the delta rule on heads of one key width.

        Args:
            recurrent: take the operator that goes token by token, not the chunked one.
            arguments: the group's `gates`, `scale`, `initial_state`, `output_final_state`,
                `cu_seqlens`.

        Returns:
            Outputs of the group's value heads, and its final state if asked for.
        """

    @abstractmethod
    def takes_steps(self, length: int) -> bool:
        """Whether fla's layer would run the recurrent operator on `length` tokens."""

    def forward(
        self,
        hidden_states: Float[Tensor, "B T hidden"],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B T hidden"], None, Any]:
        """Mix tokens. Arguments and results are those of fla's layers.

        Args:
            attention_mask: `[B, T]`, 0 for padding.
            kwargs: `cu_seqlens`, the boundaries of documents packed in one row.

        Raises:
            ValueError: the mask has another shape, or a key width does not fit the CUDA kernels.
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("attention_mask must be [batch, tokens], 0 for padding")
        self._check_device(hidden_states)
        batch, length, _ = hidden_states.shape
        cached = get_layer_cache(self, past_key_values)
        x, indices, cu_seqlens = unpad_hidden_states(
            hidden_states, kwargs.get("cu_seqlens"), attention_mask, length
        )
        options = {"output_final_state": bool(use_cache), "cu_seqlens": cu_seqlens}
        inputs, conv_state = self._inputs(x, (cached or {}).get("conv_state"), options)
        state = (cached or {}).get("recurrent_state")
        o, state = self._mix(self.takes_steps(length), x, inputs, state, options)
        update_layer_cache(
            self, past_key_values, recurrent_state=state, conv_state=conv_state, offset=length
        )
        out = repad_hidden_states(self._output(o, x), indices, batch, length)
        return out, None, past_key_values

    def _inputs(
        self, x: Tensor, state: Sequence[Tensor] | None, options: Mapping[str, Any]
    ) -> tuple[list[Float[Tensor, "B T rows"]], tuple[Tensor | None, ...] | None]:
        """Return q, k and v after convolution and activation, and the convolutions' states."""
        found = [getattr(self, f"{name}_proj")(x) for name in "qkv"]
        states = None
        if self.use_short_conv:
            pairs = [
                self.convolve(name, rows, before, **options)
                for name, rows, before in zip("qkv", found, state or (None,) * 3, strict=True)
            ]
            found, states = [pair[0] for pair in pairs], tuple(pair[1] for pair in pairs)
        return [self.activate(name, rows) for name, rows in zip("qkv", found, strict=True)], states

    def _mix(
        self, recurrent: bool, x: Tensor, inputs: list[Tensor], state: State, options: Any
    ) -> tuple[Float[Tensor, "B T HG V"], State]:
        """Return the outputs of all value heads, and the new state."""
        heads, groups = self.widths.heads, self.groups
        q, k = (gather_keys(rows, self.widths.keys, groups) for rows in inputs[:2])
        values = inputs[2].unflatten(-1, (self.widths.value_heads, self.widths.value))
        v = gather_heads(values, -2, heads, groups)
        gates = {n: gather_heads(g, -1, heads, groups) for n, g in self.gates(x).items()}
        before = state if isinstance(state, tuple) else (state,) * len(groups)
        found = [
            self.operate(
                recurrent,
                q[i],
                k[i],
                v[i],
                scale=self.widths.scale,
                initial_state=before[i],
                **{name: gate[i] for name, gate in gates.items()},
                **options,
            )
            for i in range(len(groups))
        ]
        o = merge_heads([out for out, _ in found], groups)
        return o, _joined([after for _, after in found])

    def _output(
        self, o: Float[Tensor, "B T HG V"], x: Float[Tensor, "B T hidden"]
    ) -> Float[Tensor, "B T hidden"]:
        if self.use_gate:
            gate = self.g_proj(x).unflatten(-1, (self.widths.value_heads, self.widths.value))
            return self.o_proj(self.o_norm(o, gate).flatten(-2))
        return self.o_proj(self.o_norm(o).flatten(-2))

    def _check_device(self, x: Tensor) -> None:
        for width in set(self.widths.keys) if x.is_cuda else ():
            if width not in KERNEL_WIDTHS:
                raise ValueError(
                    f"layer {self.layer_idx} has a head of {width} key channels, and fla's CUDA "
                    f"kernels take {KERNEL_WIDTHS.start} to {KERNEL_WIDTHS.stop - 1}: prune the "
                    "dense model with --multiple-of 16, or run this one on a CPU"
                )


def _joined(states: Sequence[Tensor | None]) -> State:
    """The groups' states as fla's cache keeps them: a tensor, a tuple, or None."""
    found = tuple(state for state in states if state is not None)
    return None if not found else found[0] if len(states) == 1 else found
