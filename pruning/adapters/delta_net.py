"""fla's `delta_net`: DeltaNet, one key head per value head."""

from dataclasses import dataclass

from flame.errors import UserError
from pruning.adapters.interface import Config, Site, Widths
from pruning.adapters.projections import (
    Mixer,
    ProjectionFamily,
    check_layers,
    positive_integer,
    positive_number,
    with_defaults,
)
from pruning.adapters.widths import expansion, ragged_config, uniform_sizes, widths_by_kind
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
}


@dataclass(frozen=True)
class DeltaNet(ProjectionFamily):
    """The key width is round(hidden_size * expand_k) // num_heads, the value width likewise."""

    defaults = DEFAULTS
    model_type: str = "delta_net"
    mixer_class: tuple[str, str] = ("fla.layers.delta_net", "DeltaNet")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.delta_net", "chunk_delta_rule"),
        Site("fla.layers.delta_net", "fused_recurrent_delta_rule"),
    )
    norm_sites: tuple[Site, ...] = (Site("fla.layers.delta_net", "sum_norm"),)

    def mixer(self, full: Config) -> Mixer:
        """The sizes that the config leads to."""
        per_head: tuple[tuple[str, Role], ...] = (("b_proj.weight", "projection"),)
        return Mixer(
            heads=full["num_heads"],
            value_heads=full["num_heads"],
            key_width=_head_dim(full, "expand_k"),
            value_width=_head_dim(full, "expand_v"),
            short_conv=bool(full["use_short_conv"]),
            gate=bool(full["use_gate"]),
            per_value_head=per_head if full["use_beta"] else (),
        )

    def check(self, config: Config) -> None:
        """Also raise UserError if zeroing a key channel is not the same as removing it."""
        config = with_defaults(config, DEFAULTS)
        check_layers(config)
        if config["qk_activation"] == "elu":
            raise UserError(
                "config: qk_activation is 'elu', which maps a zeroed key channel to 1, so removing "
                "it changes the model: only silu, relu and identity can be pruned"
            )
        _head_dim(config, "expand_k")
        _head_dim(config, "expand_v")

    def resize(self, config: Config, widths: Widths) -> Config:
        """A copy of the config with `num_heads`, `expand_k` and `expand_v` rewritten."""
        planned = widths_by_kind(self.spaces(config), widths)
        full = with_defaults(config, DEFAULTS)
        sizes = uniform_sizes(planned)
        if sizes is None:
            return ragged_config(config, planned, full["num_hidden_layers"])
        return {**config, **_knobs(full, self.mixer(full), sizes)}


def _knobs(full: Config, before: Mixer, sizes: dict[Kind, int]) -> Config:
    """The keys of the config that change for these sizes, with their new values."""
    heads = sizes.get("head", before.heads)
    rows = {
        "expand_k": heads * sizes.get("key", before.key_width),
        "expand_v": heads * sizes.get("value", before.value_width),
    }
    hidden = full["hidden_size"]
    knobs: Config = {"num_heads": heads} if heads != before.heads else {}
    changed = {knob: new for knob, new in rows.items() if new != round(hidden * full[knob])}
    return knobs | {knob: expansion(hidden, new) for knob, new in changed.items()}


def _head_dim(config: Config, knob: str) -> int:
    heads = positive_integer(config, "num_heads")
    size = positive_integer(config, "hidden_size") * positive_number(config, knob)
    if round(size) % heads != 0:
        raise UserError(
            f"config: hidden_size * {knob} = {size:g} is not a multiple of num_heads {heads}"
        )
    return round(size) // heads
