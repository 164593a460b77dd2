"""The width with which a model's recurrent state fits into a number of bytes."""

from collections.abc import Sequence

from flame.errors import UserError, first_line
from pruning.adapters.interface import Adapter, Config
from pruning.spaces import NOUNS, Space


def width_of_bytes(
    limit: int, step: int, adapter: Adapter, config: Config, spaces: Sequence[Space]
) -> int:
    """The largest width, the same in every head of `spaces`, with which the state fits.

    Args:
        limit: most bytes of the state.
        step: the width is a multiple of this.
        adapter: of the model's family.
        config: the model's.
        spaces: all those of one kind.

    Raises:
        UserError: the state fits already, or no width of the family makes it fit.
    """
    kind, size, dense = spaces[0].kind, spaces[0].head_dim, adapter.state_bytes(config)
    if dense <= limit:
        raise UserError(f"--state-bytes {limit}: the state takes {dense} already, nothing to prune")
    for kept in range((size - 1) // step * step, 0, -step):
        if _state_bytes(adapter, config, spaces, kept) <= limit:
            return kept
    if step >= size:
        raise UserError(
            f"no multiple of {step} is below the {size} {NOUNS[kind]}: give a smaller --multiple-of"
        )
    least = _state_bytes(adapter, config, spaces, step)
    raise UserError(
        f"--state-bytes {limit} is too little: {step} of {size} {NOUNS[kind]}, the fewest in "
        f"multiples of {step}, take {least} (all take {dense})"
    )


def _state_bytes(adapter: Adapter, config: Config, spaces: Sequence[Space], kept: int) -> int:
    widths = {space.name: (kept,) * space.num_heads for space in spaces}
    try:
        return adapter.state_bytes(adapter.resize(config, widths))
    except ValueError as error:
        raise UserError(f"{adapter.model_type} cannot have {kept}: {first_line(error)}") from error
