"""Models of ours whose heads have widths of their own: known to every command, pruned no more."""

from dataclasses import dataclass
from typing import ClassVar, NoReturn

from flame.errors import UserError
from flame.models.widths import LayerWidths, layer_widths
from pruning.adapters import delta_net, gated_deltanet
from pruning.adapters.interface import Config, Site, States
from pruning.adapters.projections import positive_integer, with_defaults
from pruning.spaces import Space


@dataclass(frozen=True)
class Ragged:
    """A slim family: state and taps of its dense family; its spaces are no longer rectangles."""

    dense: delta_net.DeltaNet | gated_deltanet.GatedDeltaNet
    defaults: dict
    mixer_class: tuple[str, str]
    can_undo_gain: ClassVar[bool] = False
    value_heads_key: ClassVar[None] = None
    tied_width: ClassVar[str] = ""

    @property
    def model_type(self) -> str:
        return f"slim_{self.dense.model_type}"

    @property
    def op_sites(self) -> tuple[Site, ...]:
        return self.dense.op_sites

    @property
    def norm_sites(self) -> tuple[Site, ...]:
        return self.dense.norm_sites

    def check(self, config: Config) -> None:
        """Refuse: what is pruned is the dense model."""
        self._refuse()

    def spaces(self, config: Config) -> list[Space]:
        """Refuse, as `check`."""
        self._refuse()

    def resize(self, config: Config, widths: object, undo_gain: bool = False) -> Config:
        """Refuse, as `check`."""
        self._refuse()

    def states(self, config: Config) -> list[States]:
        """The states of all heads as wide as they are."""
        return [
            States(layer.group, width, layer.value)
            for layer in self.widths(config).values()
            for width in layer.keys
        ]

    def state_bytes(self, config: Config) -> int:
        """All of them, in float32."""
        return sum(states.float32_bytes for states in self.states(config))

    def widths(self, config: Config) -> dict[int, LayerWidths]:
        """The widths of each layer with a recurrent state; UserError for a config without sense."""
        full = with_defaults(config, self.defaults)
        for key in ("num_heads", "hidden_size", "num_hidden_layers"):
            positive_integer(full, key)
        try:
            return layer_widths({**full, "model_type": self.model_type})
        except ValueError as error:
            raise UserError(f"config: {error}") from error

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"a {self.model_type} model is pruned already, to widths that differ between heads or "
            f"layers: take the dense {self.dense.model_type} model that it was made from"
        )


SLIM_DELTA_NET = Ragged(
    delta_net.DeltaNet(),
    delta_net.DEFAULTS,
    ("flame.models.slim_delta_net", "SlimDeltaNetMixer"),
)
SLIM_GATED_DELTANET = Ragged(
    gated_deltanet.GatedDeltaNet(),
    gated_deltanet.DEFAULTS,
    ("flame.models.slim_gated_deltanet", "SlimGatedDeltaNetMixer"),
)
