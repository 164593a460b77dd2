"""fla's `gated_deltanet`: Gated DeltaNet, with grouped value heads or without."""

from dataclasses import dataclass

from pruning.adapters.head_dim import HeadDimFamily
from pruning.adapters.interface import Config, Site
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
    "norm_eps": 1e-6,
}


@dataclass(frozen=True)
class GatedDeltaNet(HeadDimFamily):
    """With num_v_heads above num_heads, each key head, and its selection, serves a group of value
    heads, and goes together with them."""

    defaults = DEFAULTS
    value_heads_key = "num_v_heads"
    has_slim_class = True
    gate_key = "use_gate"
    model_type: str = "gated_deltanet"
    mixer_class: tuple[str, str] = ("fla.layers.gated_deltanet", "GatedDeltaNet")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.gated_deltanet", "chunk_gated_delta_rule"),
        Site("fla.layers.gated_deltanet", "fused_recurrent_gated_delta_rule"),
    )
    norm_sites: tuple[Site, ...] = ()

    def per_value_head(self, full: Config) -> tuple[tuple[str, Role], ...]:
        """The projections of β and of the decay, and the decay's parameters."""
        return PER_VALUE_HEAD


PER_VALUE_HEAD: tuple[tuple[str, Role], ...] = (
    ("b_proj.weight", "projection"),
    ("a_proj.weight", "projection"),
    ("A_log", "vector"),
    ("dt_bias", "vector"),
)
