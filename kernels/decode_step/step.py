"""What one decode step of a delta-rule layer reads and updates.

N rows, one token each; H key heads of K channels, HV value heads of V channels (HV a multiple of
H: value head h belongs to key head h // (HV / H)); convolutions of W taps.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Convolution:
    """A depthwise causal convolution of D channels, in the middle of a sequence."""

    weight: Float[Tensor, "D W"]
    """The tap of the present token is the last."""
    window: Float[Tensor, "N D W"]
    """The last W inputs of each row, the newest last; the step shifts it in place."""
    bias: Float[Tensor, " D"] | None = None


@dataclass(frozen=True)
class Decay:
    """How much of the state a token retains: exp(g), for a value head or each of its key channels.

    `input` is g itself if `a_log` is None. Otherwise g = -exp(a_log) softplus(input + dt_bias), or,
    with a lower bound, lower_bound * sigmoid(exp(a_log) (input + dt_bias)).
    """

    input: Float[Tensor, "N HV"] | Float[Tensor, "N HV*K"]
    a_log: Float[Tensor, " HV"] | None = None
    dt_bias: Float[Tensor, " HV"] | Float[Tensor, " HV*K"] | None = None
    lower_bound: float | None = None


@dataclass(frozen=True)
class Output:
    """The RMS norm over a head's V outputs, and the gate that multiplies what it gives."""

    eps: float
    weight: Float[Tensor, " V"] | None = None
    gate: Float[Tensor, "N HV*V"] | None = None
    activation: Literal["swish", "sigmoid"] = "swish"
    """What the gate's input goes through."""


@dataclass(frozen=True)
class DecodeStep:
    """A token of a delta-rule layer; `state` and the windows of the convolutions are its memory."""

    q: Float[Tensor, "N H*K"]
    k: Float[Tensor, "N H*K"]
    v: Float[Tensor, "N HV*V"]
    convolutions: tuple[Convolution, Convolution, Convolution]
    """Those of q, k and v; SiLU follows that of v."""
    state: Float[Tensor, "N HV K V"] | Float[Tensor, "N HV V K"]
    """Updated in place, in its own dtype."""
    output: Output
    heads: int
    """Key heads, H."""
    decay: Decay | None = None
    """None retains all: the delta rule."""
    beta: Float[Tensor, "N HV"] | None = None
    """The rate's input, before the sigmoid; None for a rate of 1."""
    beta_scale: float = 1.0
    """Multiplies the rate: 2 allows negative eigenvalues."""
    activate_qk: bool = True
    """Whether SiLU follows the convolutions of q and k."""
    state_v_first: bool = False
    """Whether the state is V by K, and not K by V."""
    scale: float | None = None
    """Of the normalised query; None for K**-0.5."""
    real: Shaped[Tensor, " N"] | None = None
    """0 for rows that hold padding: they give 0 and leave their memory as it is."""

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.state.shape[1]

    @property
    def key_width(self) -> int:
        """K."""
        return self.state.shape[3 if self.state_v_first else 2]

    @property
    def value_width(self) -> int:
        """V."""
        return self.state.shape[2 if self.state_v_first else 3]

    @property
    def query_scale(self) -> float:
        """The length of a query after its normalisation."""
        return self.key_width**-0.5 if self.scale is None else self.scale

    @property
    def channel_decay(self) -> bool:
        """Whether each key channel has a decay of its own."""
        return self.decay is not None and self.decay.input.shape[1] != self.value_heads

    @property
    def bytes_moved(self) -> int:
        """Bytes that the step must read and write: its floor is this over the memory's bandwidth.

        The state is read and written, and of a window all but the oldest input is read and all
        written; inputs are read, the output is written. Parameters, which all rows share, are not
        counted.
        """
        windows = [convolution.window for convolution in self.convolutions]
        taps = windows[0].shape[2]
        vectors = [self.q, self.k, self.v, self.beta, self.output.gate, self.real]
        vectors += [self.decay.input if self.decay else None]
        output = self.v
        moved = 2 * self.state.nbytes + sum(x.nbytes for x in (*vectors, output) if x is not None)
        return moved + sum(window.nbytes * (2 * taps - 1) // taps for window in windows)
