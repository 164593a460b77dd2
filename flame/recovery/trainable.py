"""Training only the parameters that `trainable.modules` names."""

import difflib
from collections.abc import Iterable, Sequence

from torch import nn

from flame.errors import UserError


def freeze_others(model: nn.Module, modules: Sequence[str]) -> None:
    """Freeze the parameters whose name contains none of `modules`.

    A parameter with several names is trained if one of them matches. An empty list changes nothing.
    An entry that is in no parameter's name raises UserError.
    """
    if not modules:
        return
    check_modules(model, modules)
    trained = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(part in name for part in modules)
    }
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)


def check_modules(model: nn.Module, modules: Sequence[str]) -> None:
    """Raise UserError for an entry of `trainable.modules` that no parameter's name contains."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for module in modules:
        if not module or not any(module in name for name in names):
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise UserError(
                f"trainable.modules names {module!r}, which is in no parameter's name: "
                f"{suggestion(module, parts)}"
            )


def suggestion(given: str, known: Iterable[str]) -> str:
    """Return `did you mean …?` with the names nearest to `given`, or a list of all known names."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
