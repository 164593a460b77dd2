"""Families whose config has `head_dim`, `expand_v`, `num_heads` and perhaps `num_v_heads`.

The key width is head_dim, the value width int(head_dim * expand_v). So a config of another key
width has both knobs rewritten, or its value width would shrink as well.
"""

from flame.errors import UserError
from pruning.adapters.interface import Config
from pruning.adapters.projections import Mixer, positive_integer, positive_number
from pruning.adapters.widths import expansion
from pruning.spaces import Kind


def check_sizes(config: Config) -> None:
    """Raise UserError unless the config's sizes make sense together; absent keys are filled."""
    heads, of_values = positive_integer(config, "num_heads"), value_heads(config)
    if of_values % heads != 0:
        raise UserError(f"config: num_v_heads {of_values} is not a multiple of num_heads {heads}")
    value_width(config)


def value_heads(config: Config) -> int:
    """num_v_heads, or num_heads where the config has none."""
    name = "num_heads" if config.get("num_v_heads") is None else "num_v_heads"
    return positive_integer(config, name)


def value_width(config: Config) -> int:
    """Channels of a value head."""
    return int(positive_integer(config, "head_dim") * positive_number(config, "expand_v"))


def knobs(config: Config, before: Mixer, sizes: dict[Kind, int]) -> Config:
    """The keys of the config that change for these sizes, with their new values."""
    d_k = sizes.get("key", before.key_width)
    d_v = sizes.get("value", before.value_width)
    heads, changed = sizes.get("head", before.heads), Config()
    if (d_k, d_v) != (before.key_width, before.value_width):
        changed |= {"head_dim": d_k, "expand_v": expansion(d_k, d_v)}
    if heads != before.heads:
        changed["num_heads"] = heads
        if config.get("num_v_heads") is not None:
            changed["num_v_heads"] = heads * before.value_heads // before.heads
    return changed
