"""fla's `gated_deltanet`: Gated DeltaNet, with grouped value heads or without."""

from dataclasses import dataclass

from pruning.adapters.head_dim import check_sizes, knobs, value_heads, value_width
from pruning.adapters.interface import Config, Site, Widths
from pruning.adapters.projections import (
    Mixer,
    ProjectionFamily,
    check_layers,
    with_defaults,
)
from pruning.adapters.widths import ragged_config, uniform_sizes, widths_by_kind
from pruning.spaces import Role

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
class GatedDeltaNet(ProjectionFamily):
    """With num_v_heads above num_heads, each key head, and its selection, serves a group of value
    heads, and goes together with them."""

    defaults = DEFAULTS
    model_type: str = "gated_deltanet"
    mixer_class: tuple[str, str] = ("fla.layers.gated_deltanet", "GatedDeltaNet")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.gated_deltanet", "chunk_gated_delta_rule"),
        Site("fla.layers.gated_deltanet", "fused_recurrent_gated_delta_rule"),
    )
    norm_sites: tuple[Site, ...] = ()

    def mixer(self, full: Config) -> Mixer:
        """The sizes that the config leads to."""
        return Mixer(
            heads=full["num_heads"],
            value_heads=value_heads(full),
            key_width=full["head_dim"],
            value_width=value_width(full),
            short_conv=bool(full["use_short_conv"]),
            gate=bool(full["use_gate"]),
            per_value_head=PER_VALUE_HEAD,
        )

    def check(self, config: Config) -> None:
        """Raise UserError for a config without sense, or without a recurrent layer."""
        config = with_defaults(config, DEFAULTS)
        check_layers(config)
        check_sizes(config)

    def resize(self, config: Config, widths: Widths) -> Config:
        """A copy with `head_dim`, `expand_v`, `num_heads` and `num_v_heads` rewritten."""
        planned = widths_by_kind(self.spaces(config), widths)
        full = with_defaults(config, DEFAULTS)
        sizes = uniform_sizes(planned)
        if sizes is None:
            return ragged_config(config, planned, full["num_hidden_layers"])
        return {**config, **knobs(full, self.mixer(full), sizes)}


PER_VALUE_HEAD: tuple[tuple[str, Role], ...] = (
    ("b_proj.weight", "projection"),
    ("a_proj.weight", "projection"),
    ("A_log", "vector"),
    ("dt_bias", "vector"),
)
