"""What is noted of a private name, and looking it up."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """A name of another library that may disappear."""

    path: str
    """Module and attributes, such as `torch.utils._pytree:tree_leaves`. `()` after an attribute
    makes an object of it, for names that its constructor sets."""
    versions: str
    """Releases in which it was found, the first and the last."""
    use: str
    """Where it is used here, and what for."""

    @property
    def last(self) -> str:
        """The name itself."""
        return self.path.replace(":", ".").rpartition(".")[2].removesuffix("()")


def missing(names: Iterable[PrivateName]) -> list[str]:
    """Return the paths of the names that the installed libraries do not have."""
    return [name.path for name in names if not _has(name.path)]


def _has(path: str) -> bool:
    module, _, attributes = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute.removesuffix("()"))
            found = found() if attribute.endswith("()") else found
    except (AttributeError, ImportError):
        return False
    return True
