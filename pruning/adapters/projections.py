"""What families with separate q, k and v projections have in common.

Their layers name tensors `model.layers.<i>.attn.{q,k}_proj.weight` and
`model.layers.<i>.attn.{q,k}_conv1d.weight`, one row per channel, heads one after another.
"""

import math
from collections.abc import Mapping

from flame.errors import UserError
from pruning.adapters.interface import Config, Widths
from pruning.spaces import Axis, HeadMajor, Space, check_count

FLOAT32_BYTES = 4


def with_defaults(config: Config, defaults: Mapping[str, object]) -> Config:
    """A copy of `config` in which absent keys have the family's defaults."""
    return {**defaults, **config}


def positive_integer(config: Config, key: str) -> int:
    """`config[key]`, if it is a positive integer; UserError otherwise."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config: {key} is {value!r}, expected a positive integer")
    return value


def positive_number(config: Config, key: str) -> float:
    """`config[key]`, if it is a positive finite number; UserError otherwise."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"config: {key} is {value!r}, expected a positive number")
    return value


def linear_layers(config: Config) -> list[int]:
    """The layers that have a recurrent state: those that `config["attn"]` does not name."""
    specifications = config.get("attn") or []
    if isinstance(specifications, dict):
        specifications = [specifications]
    for specification in specifications:
        if not isinstance(specification, dict) or not isinstance(specification.get("layers"), list):
            raise UserError(f"config: attn is {specification!r}, expected a dict with its layers")
    softmax = {layer for specification in specifications for layer in specification["layers"]}
    return [layer for layer in range(config["num_hidden_layers"]) if layer not in softmax]


def key_spaces(config: Config, num_heads: int, head_dim: int) -> list[Space]:
    """The key channels of every linear layer."""
    layout = HeadMajor(num_heads, head_dim)
    return [
        Space(
            name=f"layers.{layer}.key",
            kind="key",
            layer=layer,
            num_heads=num_heads,
            head_dim=head_dim,
            axes=_key_axes(f"model.layers.{layer}.attn", layout, bool(config["use_short_conv"])),
        )
        for layer in linear_layers(config)
    ]


def _key_axes(prefix: str, layout: HeadMajor, short_conv: bool) -> tuple[Axis, ...]:
    projections = [Axis(f"{prefix}.{name}_proj.weight", 0, layout) for name in "qk"]
    if not short_conv:
        return tuple(projections)
    convolutions = [
        Axis(f"{prefix}.{name}_conv1d.weight", 0, layout, "convolution") for name in "qk"
    ]
    return (*projections, *convolutions)


def check_exact(config: Config) -> None:
    """Raise UserError if there is nothing to prune, or removing a channel is not zeroing it.

    A convolution with a bias turns a zeroed channel into silu(bias).
    """
    positive_integer(config, "num_hidden_layers")
    if not linear_layers(config):
        raise UserError("config: attn names every layer, so there is no linear-attention layer")
    if config["use_short_conv"] and config.get("conv_bias"):
        raise UserError(
            "config: conv_bias is true, so removing a key channel is not the same as zeroing it "
            "and the pruned model would differ: only models without conv bias can be pruned"
        )


def uniform_key_width(spaces: list[Space], widths: Widths) -> int:
    """The one width in `widths`, checked against the model's key spaces.

    Raises:
        ValueError: names and spaces differ, widths are not all the same, or out of range.
    """
    names = [space.name for space in spaces]
    if sorted(names) != sorted(widths):
        differing = sorted(set(names) ^ set(widths))
        raise ValueError(f"widths and the model's spaces differ: {', '.join(differing)}")
    distinct = sorted({width for of_space in widths.values() for width in of_space})
    if len(distinct) != 1:
        raise ValueError(
            f"key widths {distinct} differ between layers or heads: a stock config has one for all"
        )
    check_count(distinct[0], spaces[0].head_dim, spaces[0].noun)
    return distinct[0]


def expansion(base: int, target: int) -> float:
    """A factor with int(base * factor) == target, the nearest to target / base.

    The quotient itself is off by one for some pairs, 98 and 128 among them, where the product
    rounds to below the target.
    """
    factor = target / base
    while int(base * factor) < target:
        factor = math.nextafter(factor, math.inf)
    return factor
