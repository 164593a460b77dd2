"""fla's `gated_deltanet`: Gated DeltaNet, with grouped value heads or without."""

from dataclasses import dataclass

from flame.errors import UserError
from pruning.adapters.interface import Config, Site, Widths
from pruning.adapters.projections import (
    FLOAT32_BYTES,
    check_exact,
    expansion,
    key_spaces,
    linear_layers,
    positive_integer,
    positive_number,
    uniform_key_width,
    with_defaults,
)
from pruning.spaces import Space

DEFAULTS = {
    "hidden_size": 2048,
    "head_dim": 256,
    "expand_v": 2.0,
    "num_heads": 6,
    "num_v_heads": None,
    "num_hidden_layers": 21,
    "use_short_conv": True,
    "attn": None,
}


@dataclass(frozen=True)
class GatedDeltaNet:
    """The key width is head_dim, the value width int(head_dim * expand_v).

    So a resized config has both knobs rewritten, or its value width would shrink as well. With
    num_v_heads above num_heads, each key head, and its selection, serves a group of value heads.
    """

    model_type: str = "gated_deltanet"
    mixer_class: tuple[str, str] = ("fla.layers.gated_deltanet", "GatedDeltaNet")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.gated_deltanet", "chunk_gated_delta_rule"),
        Site("fla.layers.gated_deltanet", "fused_recurrent_gated_delta_rule"),
    )
    norm_sites: tuple[Site, ...] = ()

    def check(self, config: Config) -> None:
        """Raise UserError if zeroing a key channel is not the same as removing it."""
        config = with_defaults(config, DEFAULTS)
        check_exact(config)
        heads, value_heads = positive_integer(config, "num_heads"), _value_heads(config)
        if value_heads % heads != 0:
            raise UserError(
                f"config: num_v_heads {value_heads} is not a multiple of num_heads {heads}"
            )
        _value_width(config)

    def spaces(self, config: Config) -> list[Space]:
        """The key channels of every layer that is not softmax attention."""
        config = with_defaults(config, DEFAULTS)
        return key_spaces(config, config["num_heads"], config["head_dim"])

    def resize(self, config: Config, widths: Widths) -> Config:
        """A copy of the config with `head_dim` and `expand_v` rewritten."""
        kept = uniform_key_width(self.spaces(config), widths)
        full = with_defaults(config, DEFAULTS)
        if kept == full["head_dim"]:
            return dict(config)
        return {**config, "head_dim": kept, "expand_v": expansion(kept, _value_width(full))}

    def state_bytes(self, config: Config) -> int:
        """One state of d_k x d_v per value head and linear layer, in float32."""
        config = with_defaults(config, DEFAULTS)
        state = config["head_dim"] * _value_width(config)
        return len(linear_layers(config)) * _value_heads(config) * state * FLOAT32_BYTES


def _value_heads(config: Config) -> int:
    if config["num_v_heads"] is None:
        return positive_integer(config, "num_heads")
    return positive_integer(config, "num_v_heads")


def _value_width(config: Config) -> int:
    return int(positive_integer(config, "head_dim") * positive_number(config, "expand_v"))
