"""Names of tensors in DCP steps that other programs wrote, brought to the stock names.

torchtitan saves the model's tensors at the top, beside `optimizer.`, `lr_scheduler.`, `dataloader.`
and `train_state.`; flame's converters and older versions save them below `model.`; whoever saves a
wrapped module's own state dict has the wrappers in the names.
"""

from collections.abc import Iterable

from flame.errors import UserError

TRAINING_ENTRIES = frozenset({
    "optimizer", "optimizers", "optim", "lr_scheduler", "lr_schedulers", "scheduler", "dataloader",
    "data_loader", "train_state", "rng_state", "extra_state",
})  # fmt: skip
"""First parts of the names that belong to the training state."""

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Parts of names that torch.compile, activation checkpointing and FSDP1 put in."""

_OUTER = "model."
_INSIDE = (f"{_OUTER}model.", f"{_OUTER}lm_head.")
"""Beginnings of names in a step that keeps the whole model below `model.`."""


def stock_names(stored: Iterable[str]) -> dict[str, str]:
    """Return the name in a step of each tensor of its model, by the tensor's stock name.

    Entries of the training state are left out.

    Raises:
        UserError: two tensors would have one name.
    """
    plain = {name: _unwrapped(name) for name in stored}
    inside = any(name.startswith(_INSIDE) for name in plain.values())
    found: dict[str, str] = {}
    for name, short in plain.items():
        if short.partition(".")[0] in TRAINING_ENTRIES:
            continue
        if inside and not short.startswith(_OUTER):
            continue
        short = short.removeprefix(_OUTER) if inside else short
        if short in found:
            raise UserError(f"the step holds {found[short]} and {name}, which are both {short}")
        found[short] = name
    return found


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    # DDP puts `module` before everything.
    return ".".join(parts[1:] if parts[0] == "module" else parts)
