"""fla's `delta_net`: DeltaNet, one key head per value head."""

from collections.abc import Mapping
from dataclasses import dataclass

from flame.errors import UserError
from flame.models.widths import delta_net_shape
from pruning.adapters.interface import Config, Site
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

DEFAULTS = {
    "hidden_size": 2048,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "num_heads": 16,
    "num_hidden_layers": 24,
    "use_beta": True,
    "use_gate": False,
    "use_short_conv": True,
    "qk_activation": "silu",
    "attn": None,
    "norm_eps": 1e-6,
}


@dataclass(frozen=True)
class DeltaNet(ProjectionFamily):
    """The key width is round(hidden_size * expand_k) // num_heads, the value width likewise."""

    defaults = DEFAULTS
    has_slim_class = True
    model_type: str = "delta_net"
    mixer_class: tuple[str, str] = ("fla.layers.delta_net", "DeltaNet")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.delta_net", "chunk_delta_rule"),
        Site("fla.layers.delta_net", "fused_recurrent_delta_rule"),
    )
    norm_sites: tuple[Site, ...] = (Site("fla.layers.delta_net", "sum_norm"),)

    def sizes(self, full: Config) -> MixerSizes:
        """The sizes that the config leads to."""
        shape = delta_net_shape(full)
        per_head: tuple[tuple[str, Role], ...] = (("b_proj.weight", "projection"),)
        return MixerSizes(
            heads=shape.heads,
            value_heads=shape.heads,
            key_width=shape.key,
            value_width=shape.value,
            short_conv=bool(full["use_short_conv"]),
            gate=bool(full["use_gate"]),
            per_value_head=per_head if full["use_beta"] else (),
        )

    def check(self, config: Config) -> None:
        """Also raise UserError if zeroing a key channel is not the same as removing it."""
        full = with_defaults(config, DEFAULTS)
        check_layers(full)
        if full["qk_activation"] == "elu":
            raise UserError(
                "config: qk_activation is 'elu', which maps a zeroed key channel to 1, so removing "
                "it changes the model: only silu, relu and identity can be pruned"
            )
        heads, hidden = (positive_integer(full, key) for key in ("num_heads", "hidden_size"))
        for knob in ("expand_k", "expand_v"):
            size = hidden * positive_number(full, knob)
            if round(size) % heads != 0:
                raise UserError(
                    f"config: hidden_size * {knob} = {size:g} is not a multiple of num_heads "
                    f"{heads}"
                )

    def knobs(self, full: Config, sizes: Mapping[Kind, int]) -> Config:
        """`num_heads`, `expand_k` and `expand_v`, as far as they change."""
        before, hidden = self.sizes(full), full["hidden_size"]
        heads = sizes.get("head", before.heads)
        rows = {
            "expand_k": heads * sizes.get("key", before.key_width),
            "expand_v": heads * sizes.get("value", before.value_width),
        }
        changed = {knob: new for knob, new in rows.items() if new != round(hidden * full[knob])}
        knobs: Config = {"num_heads": heads} if heads != before.heads else {}
        return knobs | {knob: expansion(hidden, new) for knob, new in changed.items()}
