"""What pruning must know of a model family.

`config` is the model's config.json as a plain dict everywhere; a key that is absent has the
family's default.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from pruning.spaces import Space

Config = dict[str, Any]

Widths = Mapping[str, tuple[int, ...]]
"""Kept channels of each head of the planned spaces, by the space's name."""


class Site(NamedTuple):
    """A name in a module's namespace, where the family's layer looks a function up."""

    module: str
    attribute: str


class States(NamedTuple):
    """Recurrent states of one sequence that have the same shape."""

    heads: int
    """Value heads, over all layers of this shape."""
    key_width: int
    value_width: int

    @property
    def float32_bytes(self) -> int:
        """What they take as float32 numbers."""
        return 4 * self.heads * self.key_width * self.value_width


class Adapter(Protocol):
    """One model family: its spaces, its taps, and how its config is resized."""

    @property
    def model_type(self) -> str:
        """`model_type` of the family's config.json."""
        ...

    @property
    def mixer_class(self) -> tuple[str, str]:
        """Module and name of the token mixer's class; its instances have `layer_idx`."""
        ...

    @property
    def can_undo_gain(self) -> bool:
        """Whether a config of the family has the eps of the output norm."""
        ...

    @property
    def value_heads_key(self) -> str | None:
        """The config's key for more value heads than key heads; None for a family without it."""
        ...

    @property
    def tied_width(self) -> str:
        """The config's key that is both the key and the value width; empty if they are two.

        Both kinds of channels then go to one width together.
        """
        ...

    @property
    def op_sites(self) -> tuple[Site, ...]:
        """Where the mixer looks up the delta-rule operators."""
        ...

    @property
    def norm_sites(self) -> tuple[Site, ...]:
        """Where it looks up a normalisation of q, then k, that it applies before the operator."""
        ...

    def check(self, config: Config) -> None:
        """Raise UserError, with the reason, if a model of this config cannot be pruned exactly."""
        ...

    def spaces(self, config: Config) -> list[Space]:
        """The spaces of the model, by layer; layers without a recurrent state have none."""
        ...

    def resize(self, config: Config, widths: Widths, undo_gain: bool = False) -> Config:
        """A copy of the config for what is kept of the planned spaces.

        It is a stock config if all layers and heads agree, otherwise the config of the family's
        slim class (`pruning.adapters.widths`).

        Args:
            config: the model's.
            widths: as `pruning.spaces.widths_of` gives them: key widths of the heads that survive.
            undo_gain: whether the result undoes the gain of fewer channels
                (`pruning.planning.gain`); a stock config does by the eps of all its norms.

        Raises:
            ValueError: a kind is planned in some layers only, a width is out of range, a name is
                not a space of the model, or widths differ and the family has no class for that.
        """
        ...

    def states(self, config: Config) -> list[States]:
        """The recurrent states of one sequence."""
        ...

    def state_bytes(self, config: Config) -> int:
        """Bytes of the recurrent state of one sequence over all layers, in float32."""
        ...
