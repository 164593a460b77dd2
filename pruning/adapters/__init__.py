"""Model families by `model_type`. To add one, write its file and add its line here."""

from typing import TYPE_CHECKING

from flame.errors import UserError
from pruning.adapters.delta_net import DeltaNet
from pruning.adapters.delta_net2 import DeltaNet2
from pruning.adapters.gated_deltanet import GatedDeltaNet
from pruning.adapters.gated_deltaproduct import GatedDeltaProduct
from pruning.adapters.hybrids import HYBRIDS
from pruning.adapters.interface import Adapter, Config
from pruning.adapters.kda import Kda
from pruning.adapters.kda_hybrids import KDA_HYBRIDS
from pruning.adapters.ragged import SLIM_DELTA_NET, SLIM_GATED_DELTANET, Ragged
from pruning.spaces import Kind

if TYPE_CHECKING:
    from kernels.stored_states import StateStorage

PRUNED: dict[str, Ragged] = {
    adapter.model_type: adapter for adapter in (SLIM_DELTA_NET, SLIM_GATED_DELTANET)
}
"""Families that pruning makes: measured and tapped like any other, but not pruned again."""

_DENSE: tuple[Adapter, ...] = (
    DeltaNet(),
    DeltaNet2(),
    GatedDeltaNet(),
    GatedDeltaProduct(),
    Kda(),
    *HYBRIDS,
    *KDA_HYBRIDS,
)

ADAPTERS: dict[str, Adapter] = {
    adapter.model_type: adapter for adapter in (*_DENSE, *PRUNED.values())
}

TIED: dict[str, str] = {
    "bailing_hybrid": "linear_head_dim is both its key and its value width, and linear_num_heads "
    "is shared with its latent attention",
    "lightning": "head_dim is both its key and its value width",
    "mesa_net": "head_dim is both its key and its value width",
    "rwkv7": "head_dim is both its key and its value width",
}
"""Families with a matrix state whose config has no key width of its own, with the reason."""

TIED_KINDS: dict[tuple[str, Kind], str] = {
    ("kda", "value"): "its value width is also the rank of its decay's and its gate's projections",
}
"""Spaces, by family and kind, that the family's config cannot resize alone, with the reason."""


def adapter_for(config: Config) -> Adapter:
    """The adapter of a model by its config, checked: the model can be pruned.

    Raises:
        UserError: the family is unknown, has no key width of its own, or the adapter refuses this
            config.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ADAPTERS:
        raise UserError(_refusal(model_type))
    adapter = ADAPTERS[model_type]
    adapter.check(config)
    return adapter


def state_bytes(config: Config, storage: "StateStorage | None" = None) -> int | None:
    """Bytes of one sequence's recurrent state; None for a family without an adapter.

    Args:
        config: the model's.
        storage: how the states are stored; None for float32.
    """
    adapter = ADAPTERS.get(config["model_type"])
    if adapter is None or storage is None:
        return None if adapter is None else adapter.state_bytes(config)
    return sum(storage.bytes(*states) for states in adapter.states(config))


def _refusal(model_type: object) -> str:
    known = ", ".join(sorted(set(ADAPTERS) - set(PRUNED)))
    if model_type is None:
        return f"config has no model_type: pruning knows the families {known}"
    if isinstance(model_type, str) and model_type in TIED:
        return (
            f"key channels of {model_type} cannot be pruned: {TIED[model_type]}, so no stock "
            f"config describes the result: use a family that keeps the two apart ({known})"
        )
    return f"no adapter for model family {model_type!r}: pruning knows the families {known}"
