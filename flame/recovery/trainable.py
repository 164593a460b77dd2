"""Which parameters a run trains, and names that a person got wrong."""

import difflib
from collections.abc import Iterable, Sequence

from torch import nn

from flame.errors import UserError


def freeze_others(model: nn.Module, modules: Sequence[str]) -> None:
    """Train only the parameters whose name contains one of `modules`; with none, all."""
    if not modules:
        return
    check_modules(model, modules)
    trained = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(part in name for part in modules)
    }
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def check_modules(model: nn.Module, modules: Sequence[str]) -> None:
    """Refuse a name of `trainable.modules` that no parameter's name contains."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for module in modules:
        if not module or not any(module in name for name in names):
            raise UserError(
                f"trainable.modules names {module!r}, which is in no parameter's name: "
                f"{suggestion(module, parts(names))}"
            )


def parts(names: Iterable[str]) -> set[str]:
    """The parts between dots of parameters' names, numbers left out."""
    return {part for name in names for part in name.split(".") if not part.isdigit()}


def suggestion(given: str, known: Iterable[str]) -> str:
    """`did you mean …?` where something is near, otherwise what there is."""
    known = sorted(set(known))
    near = difflib.get_close_matches(given, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
