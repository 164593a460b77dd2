"""fla's `gated_deltanet`: Gated DeltaNet, with grouped value heads or without."""

from dataclasses import dataclass

from flame.errors import UserError
from pruning.adapters.interface import Config, Site, Widths
from pruning.adapters.projections import (
    Mixer,
    check_exact,
    linear_layers,
    mixer_spaces,
    positive_integer,
    positive_number,
    with_defaults,
)
from pruning.adapters.widths import expansion, ragged_config, uniform_sizes, widths_by_kind
from pruning.spaces import Kind, Role, Space

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
    """The key width is head_dim, the value width int(head_dim * expand_v).

    So a config of another key width has both knobs rewritten, or its value width would shrink as
    well. With num_v_heads above num_heads, each key head, and its selection, serves a group of
    value heads, and goes together with them.
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
        return {**config, **_knobs(full, sizes)}

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
        value_heads=_value_heads(config),
        key_width=config["head_dim"],
        value_width=_value_width(config),
        short_conv=bool(config["use_short_conv"]),
        gate=bool(config["use_gate"]),
        per_value_head=PER_VALUE_HEAD,
    )


def _knobs(full: Config, sizes: dict[Kind, int]) -> Config:
    """The keys of the config that change for these sizes, with their new values."""
    before, knobs = _mixer(full), dict[str, object]()
    d_k = sizes.get("key", before.key_width)
    d_v = sizes.get("value", before.value_width)
    heads = sizes.get("head", before.heads)
    if (d_k, d_v) != (before.key_width, before.value_width):
        knobs |= {"head_dim": d_k, "expand_v": expansion(d_k, d_v)}
    if heads != before.heads:
        knobs["num_heads"] = heads
        if full["num_v_heads"] is not None:
            knobs["num_v_heads"] = heads * before.value_heads // before.heads
    return knobs


def _value_heads(config: Config) -> int:
    if config["num_v_heads"] is None:
        return positive_integer(config, "num_heads")
    return positive_integer(config, "num_v_heads")


def _value_width(config: Config) -> int:
    return int(positive_integer(config, "head_dim") * positive_number(config, "expand_v"))
