"""fla's `gated_deltanet`: Gated DeltaNet, with grouped value heads or without."""

from dataclasses import dataclass

from pruning.adapters.head_dim import check_sizes, knobs, value_heads, value_width
from pruning.adapters.interface import Config, Site, Widths
from pruning.adapters.projections import (
    Mixer,
    check_layers,
    linear_layers,
    mixer_spaces,
    with_defaults,
)
from pruning.adapters.widths import ragged_config, uniform_sizes, widths_by_kind
from pruning.spaces import Role, Space

DEFAULTS = {
    "hidden_size": 2048,
    "head_dim": 256,
    "expand_v": 2.0,
    "num_heads": 6,
    "num_v_heads": None,
    "num_hidden_layers": 21,
    "use_gate": True,
    "use_short_conv": True,
    "attn": None,
}


@dataclass(frozen=True)
class GatedDeltaNet:
    """With num_v_heads above num_heads, each key head, and its selection, serves a group of value
    heads, and goes together with them."""

    model_type: str = "gated_deltanet"
    mixer_class: tuple[str, str] = ("fla.layers.gated_deltanet", "GatedDeltaNet")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.gated_deltanet", "chunk_gated_delta_rule"),
        Site("fla.layers.gated_deltanet", "fused_recurrent_gated_delta_rule"),
    )
    norm_sites: tuple[Site, ...] = ()

    def check(self, config: Config) -> None:
        """Raise UserError for a config without sense, or without a recurrent layer."""
        config = with_defaults(config, DEFAULTS)
        check_layers(config)
        check_sizes(config)

    def spaces(self, config: Config) -> list[Space]:
        """The spaces of every layer that is not softmax attention."""
        config = with_defaults(config, DEFAULTS)
        return mixer_spaces(linear_layers(config), _mixer(config))

    def resize(self, config: Config, widths: Widths) -> Config:
        """A copy with `head_dim`, `expand_v`, `num_heads` and `num_v_heads` rewritten."""
        planned = widths_by_kind(self.spaces(config), widths)
        full = with_defaults(config, DEFAULTS)
        sizes = uniform_sizes(planned)
        if sizes is None:
            return ragged_config(config, planned, full["num_hidden_layers"])
        return {**config, **knobs(full, _mixer(full), sizes)}

    def state_bytes(self, config: Config) -> int:
        """One state of d_k x d_v per value head and linear layer, in float32."""
        config = with_defaults(config, DEFAULTS)
        return len(linear_layers(config)) * _mixer(config).state_bytes


PER_VALUE_HEAD: tuple[tuple[str, Role], ...] = (
    ("b_proj.weight", "projection"),
    ("a_proj.weight", "projection"),
    ("A_log", "vector"),
    ("dt_bias", "vector"),
)


def _mixer(config: Config) -> Mixer:
    return Mixer(
        heads=config["num_heads"],
        value_heads=value_heads(config),
        key_width=config["head_dim"],
        value_width=value_width(config),
        short_conv=bool(config["use_short_conv"]),
        gate=bool(config["use_gate"]),
        per_value_head=PER_VALUE_HEAD,
    )
