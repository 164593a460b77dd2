"""fla's `gated_deltaproduct`: Gated DeltaProduct, several delta-rule steps a token."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from pruning.adapters.gated_deltanet import PER_VALUE_HEAD
from pruning.adapters.head_dim import HeadDimFamily
from pruning.adapters.interface import Config, Site
from pruning.adapters.projections import positive_integer, with_defaults
from pruning.layouts import Layout
from pruning.spaces import Axis, Role, Space

DEFAULTS = {
    "hidden_size": 2048,
    "head_dim": 256,
    "expand_v": 2.0,
    "num_heads": 6,
    "num_hidden_layers": 21,
    "num_householder": 1,
    "use_forget_gate": False,
    "use_output_gate": True,
    "use_short_conv": True,
    "attn": None,
    "norm_eps": 1e-6,
}

STEPPED = ("k_proj", "k_conv1d", "v_proj", "v_conv1d", "b_proj")
"""Tensors with a block of rows for each householder step of a token."""


@dataclass(frozen=True)
class Repeated:
    """`repeats` blocks, one after another, of what `layout` lays out: a channel lies in each."""

    layout: Layout
    repeats: int

    @property
    def size(self) -> int:
        """repeats * the size of a block."""
        return self.repeats * self.layout.size

    def table(self) -> Int64[Tensor, "H d m"]:
        """The channel's positions in the first block, the second, and so on."""
        table = self.layout.table()
        return torch.cat([table + i * self.layout.size for i in range(self.repeats)], -1)


@dataclass(frozen=True)
class GatedDeltaProduct(HeadDimFamily):
    """The keys, values and writing strengths of a token's steps are blocks of rows.

    A key channel lies in the one q and in the keys of all steps, which write to one state. The
    stock model has as many value heads as key heads.
    """

    defaults = DEFAULTS
    gate_key = "use_output_gate"
    model_type: str = "gated_deltaproduct"
    mixer_class: tuple[str, str] = ("fla.layers.gated_deltaproduct", "GatedDeltaProduct")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.gated_deltaproduct", "chunk_gated_delta_product"),
        Site("fla.layers.gated_deltaproduct", "fused_recurrent_gated_delta_rule"),
    )
    norm_sites: tuple[Site, ...] = ()

    def per_value_head(self, full: Config) -> tuple[tuple[str, Role], ...]:
        """The projection of β, and where there is a forget gate what makes the decay."""
        return PER_VALUE_HEAD if full["use_forget_gate"] else PER_VALUE_HEAD[:1]

    def check(self, config: Config) -> None:
        """As the base, and `num_householder` must be a positive integer."""
        super().check(config)
        positive_integer(with_defaults(config, DEFAULTS), "num_householder")

    def spaces(self, config: Config) -> list[Space]:
        """The spaces of every layer that is not softmax attention."""
        steps = with_defaults(config, DEFAULTS)["num_householder"]
        return [
            replace(space, axes=tuple(_stepped(axis, steps) for axis in space.axes))
            for space in super().spaces(config)
        ]


def _stepped(axis: Axis, steps: int) -> Axis:
    if axis.fqn.split(".")[-2] not in STEPPED:
        return axis
    return replace(axis, layout=Repeated(axis.layout, steps))
