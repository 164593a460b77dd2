"""fla's `gated_deltaproduct`: Gated DeltaProduct, several delta-rule steps a token."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from pruning.adapters.head_dim import check_sizes, knobs, value_width
from pruning.adapters.interface import Config, Site, Widths
from pruning.adapters.projections import (
    Mixer,
    ProjectionFamily,
    check_layers,
    positive_integer,
    with_defaults,
)
from pruning.adapters.widths import only_sizes, widths_by_kind
from pruning.spaces import Axis, Layout, Role, Space

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
}

STEPPED = ("k_proj", "k_conv1d", "v_proj", "v_conv1d", "b_proj")
"""Tensors with a block of rows for each householder step of a token."""


@dataclass(frozen=True)
class Repeated:
    """`times` blocks, one after another, of what `layout` lays out: a channel lies in each."""

    layout: Layout
    times: int

    @property
    def size(self) -> int:
        """times * the size of a block."""
        return self.times * self.layout.size

    def table(self) -> Int64[Tensor, "H d m"]:
        """The channel's positions in the first block, the second, and so on."""
        table = self.layout.table()
        return torch.cat([table + i * self.layout.size for i in range(self.times)], -1)


@dataclass(frozen=True)
class GatedDeltaProduct(ProjectionFamily):
    """The keys, values and writing strengths of a token's steps are blocks of rows.

    A key channel lies in the one q and in the keys of all steps, which write to one state. The
    stock model has as many value heads as key heads.
    """

    defaults = DEFAULTS
    model_type: str = "gated_deltaproduct"
    mixer_class: tuple[str, str] = ("fla.layers.gated_deltaproduct", "GatedDeltaProduct")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.gated_deltaproduct", "chunk_gated_delta_product"),
        Site("fla.layers.gated_deltaproduct", "fused_recurrent_gated_delta_rule"),
    )
    norm_sites: tuple[Site, ...] = ()

    def mixer(self, full: Config) -> Mixer:
        """The sizes that the config leads to."""
        per_head: tuple[tuple[str, Role], ...] = (("b_proj.weight", "projection"),)
        if full["use_forget_gate"]:
            per_head += (
                ("a_proj.weight", "projection"),
                ("A_log", "vector"),
                ("dt_bias", "vector"),
            )
        return Mixer(
            heads=full["num_heads"],
            value_heads=full["num_heads"],
            key_width=full["head_dim"],
            value_width=value_width(full),
            short_conv=bool(full["use_short_conv"]),
            gate=bool(full["use_output_gate"]),
            per_value_head=per_head,
        )

    def check(self, config: Config) -> None:
        """Raise UserError for a config without sense, or without a recurrent layer."""
        config = with_defaults(config, DEFAULTS)
        check_layers(config)
        check_sizes(config | {"num_v_heads": None})
        positive_integer(config, "num_householder")

    def spaces(self, config: Config) -> list[Space]:
        """The spaces of every layer that is not softmax attention."""
        steps = with_defaults(config, DEFAULTS)["num_householder"]
        return [
            replace(space, axes=tuple(_stepped(axis, steps) for axis in space.axes))
            for space in super().spaces(config)
        ]

    def resize(self, config: Config, widths: Widths) -> Config:
        """A copy with `head_dim`, `expand_v` and `num_heads` rewritten."""
        sizes = only_sizes(self.model_type, widths_by_kind(self.spaces(config), widths))
        full = with_defaults(config, DEFAULTS) | {"num_v_heads": None}
        return {**config, **knobs(full, self.mixer(full), sizes)}


def _stepped(axis: Axis, steps: int) -> Axis:
    if axis.fqn.split(".")[-2] not in STEPPED:
        return axis
    return replace(axis, layout=Repeated(axis.layout, steps))
