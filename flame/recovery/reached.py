"""Finding trained parameters that no gradient reaches.

Some models read the weight of a linear module and give it to a fused kernel without calling the
module (`o_proj` under a fused norm in fla's GSA, for one). An adapter on it would stay at zero.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from flame.errors import UserError
from flame.process.distributed import gather_objects


def check_reached(model: nn.Module, targets: Sequence[str], others: Sequence[str]) -> None:
    """Raise UserError for an entry of `[lora]` or `[trainable]` that trains nothing. Collective.

    Args:
        model: after a backward pass, its gradients not yet cleared.
        targets: last parts of the names of modules that have an adapter.
        others: parts of the names of parameters that are trained in full.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    entries = {
        **{target: [p for n, p in named if f".{target}.lora_B." in n] for target in targets},
        **{part: [p for n, p in named if part in n and ".lora_" not in n] for part in others},
    }
    entries = {entry: parameters for entry, parameters in entries.items() if parameters}
    reached = {e for e, ps in entries.items() if any(p.grad is not None for p in ps)}
    # Experts of a mixture may have no token on one rank.
    reached = set().union(*gather_objects(reached))
    for entry in entries:
        if entry not in reached:
            raise UserError(
                f"no gradient reaches {entry!r}, so that it would not be trained: the model reads "
                "its weight in a fused kernel and does not call it; leave it out of [lora]'s "
                "target_modules, or name it in lora.train_also, which trains the weight itself"
            )


def trained_entries(job: Any) -> tuple[list[str], list[str]]:
    """Return the entries of a job's `[lora]` and `[trainable]` that `check_reached` looks at."""
    if job.lora.rank > 0:
        return list(job.lora.target_modules), list(job.lora.train_also)
    return [], list(job.trainable.modules)
