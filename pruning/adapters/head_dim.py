"""Families whose config has `head_dim`, `expand_v`, `num_heads` and perhaps `num_v_heads`.

The key width is head_dim, the value width int(head_dim * expand_v). So a config of another key
width has both knobs rewritten, or its value width would shrink as well.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from flame.errors import UserError
from flame.models.widths import gated_deltanet_shape
from pruning.adapters.interface import Config
from pruning.adapters.projections import (
    MixerSizes,
    ProjectionFamily,
    check_layers,
    positive_integer,
    positive_number,
    with_defaults,
)
from pruning.adapters.widths import expansion
from pruning.spaces import Kind, Role


class HeadDimFamily(ProjectionFamily):
    """Base of these families: their sizes, the check of a config, and its knobs."""

    gate_key: ClassVar[str | None] = None
    """The key that switches an output gate with a row for each value channel; None for no such."""

    @abstractmethod
    def per_value_head(self, full: Config) -> tuple[tuple[str, Role], ...]:
        """Tensors with one position along dimension 0 for each value head, with their roles."""

    def sizes(self, full: Config) -> MixerSizes:
        """The sizes that the config leads to."""
        shape = gated_deltanet_shape({"num_v_heads": None, **full})
        return MixerSizes(
            heads=shape.heads,
            value_heads=shape.heads * shape.group,
            key_width=shape.key,
            value_width=shape.value,
            short_conv=bool(full["use_short_conv"]),
            gate=self.gate_key is not None and bool(full[self.gate_key]),
            per_value_head=self.per_value_head(full),
        )

    def check(self, config: Config) -> None:
        """Raise UserError for sizes that do not go together, or without a recurrent layer."""
        full = with_defaults(config, self.defaults)
        check_layers(full)
        positive_integer(full, "head_dim")
        positive_number(full, "expand_v")
        heads = positive_integer(full, "num_heads")
        if full.get("num_v_heads") is not None and positive_integer(full, "num_v_heads") % heads:
            raise UserError(
                f"config: num_v_heads {full['num_v_heads']} is not a multiple of num_heads {heads}"
            )

    def knobs(self, full: Config, sizes: Mapping[Kind, int]) -> Config:
        """`head_dim`, `expand_v`, `num_heads` and `num_v_heads`, as far as they change."""
        before = self.sizes(full)
        d_k = sizes.get("key", before.key_width)
        d_v = sizes.get("value", before.value_width)
        heads, changed = sizes.get("head", before.heads), Config()
        value_heads = heads * sizes.get("value-head", before.group)
        if (d_k, d_v) != (before.key_width, before.value_width):
            changed |= {"head_dim": d_k, "expand_v": expansion(d_k, d_v)}
        if heads != before.heads:
            changed["num_heads"] = heads
        if value_heads != before.value_heads and full.get("num_v_heads") is not None:
            changed["num_v_heads"] = value_heads
        return changed
