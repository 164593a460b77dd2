"""fla's `delta_net`: DeltaNet, one key head per value head."""

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
    "expand_k": 1.0,
    "expand_v": 1.0,
    "num_heads": 16,
    "num_hidden_layers": 24,
    "use_short_conv": True,
    "qk_activation": "silu",
    "attn": None,
}


@dataclass(frozen=True)
class DeltaNet:
    """The key width is round(hidden_size * expand_k) // num_heads."""

    model_type: str = "delta_net"
    mixer_class: tuple[str, str] = ("fla.layers.delta_net", "DeltaNet")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.delta_net", "chunk_delta_rule"),
        Site("fla.layers.delta_net", "fused_recurrent_delta_rule"),
    )
    norm_sites: tuple[Site, ...] = (Site("fla.layers.delta_net", "sum_norm"),)

    def check(self, config: Config) -> None:
        """Raise UserError if zeroing a key channel is not the same as removing it."""
        config = with_defaults(config, DEFAULTS)
        check_exact(config)
        if config["qk_activation"] == "elu":
            raise UserError(
                "config: qk_activation is 'elu', which maps a zeroed key channel to 1, so removing "
                "it changes the model: only silu, relu and identity can be pruned"
            )
        _head_dim(config, "expand_k")
        _head_dim(config, "expand_v")

    def spaces(self, config: Config) -> list[Space]:
        """The key channels of every layer that is not softmax attention."""
        config = with_defaults(config, DEFAULTS)
        return key_spaces(config, config["num_heads"], _head_dim(config, "expand_k"))

    def resize(self, config: Config, widths: Widths) -> Config:
        """A copy of the config with `expand_k` rewritten."""
        kept = uniform_key_width(self.spaces(config), widths)
        full = with_defaults(config, DEFAULTS)
        if kept == _head_dim(full, "expand_k"):
            return dict(config)
        return {**config, "expand_k": expansion(full["hidden_size"], full["num_heads"] * kept)}

    def state_bytes(self, config: Config) -> int:
        """num_heads states of d_k x d_v per linear layer, in float32."""
        config = with_defaults(config, DEFAULTS)
        state = _head_dim(config, "expand_k") * _head_dim(config, "expand_v")
        return len(linear_layers(config)) * config["num_heads"] * state * FLOAT32_BYTES


def _head_dim(config: Config, knob: str) -> int:
    heads = positive_integer(config, "num_heads")
    size = positive_integer(config, "hidden_size") * positive_number(config, knob)
    if round(size) % heads != 0:
        raise UserError(
            f"config: hidden_size * {knob} = {size:g} is not a multiple of num_heads {heads}"
        )
    return round(size) // heads
