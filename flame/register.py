"""`import flame.register`: the one import that lets fla's models run anywhere.

Importing has side effects, on purpose; they are idempotent:

- our `kernels` folder becomes part of the `kernels` namespace even where the Hugging Face package
  of that name is installed, which as a regular package would hide it;
- fla's operators get a CPU path (`kernels.fla_cpu`); tensors of an accelerator go on to fla's own
  kernels;
- model classes of this project (`flame.models`) are registered with transformers' Auto classes.

It imports fla, which imports transformers, and nothing of torchtitan.
"""

import importlib
import importlib.util
import warnings
from pathlib import Path

from flame.errors import UserError

_KERNELS = str(Path(__file__).resolve().parent.parent / "kernels")


def _join_kernels() -> None:
    """Append our folder to the path of whatever package is called `kernels`."""
    path = importlib.import_module("kernels").__path__
    if _KERNELS not in list(path):
        path.append(_KERNELS)


def _import_fla() -> None:
    """Import fla without its warning that it finds no GPU: `kernels.fla_cpu` is what follows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Triton is not supported on current platform")
        importlib.import_module("fla.models")


def register() -> None:
    """Do what importing this module does; calling it again changes nothing."""
    if importlib.util.find_spec("triton") is None:
        raise UserError("fla needs the package triton, also on a CPU: pip install triton")
    _join_kernels()
    _import_fla()
    importlib.import_module("kernels.fla_cpu").install()
    importlib.import_module("flame.models").register_classes()


register()
