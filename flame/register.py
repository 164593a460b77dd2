"""`import flame.register`: the one import that lets fla's models run anywhere.

Importing it has these side effects, which do no more when repeated:

- our `kernels` folder joins the package `kernels`, also if that is the Hugging Face package of that
  name, which would hide ours;
- fla's operators get a CPU path (`kernels.fla_cpu`); an accelerator's tensors take fla's own
  kernels, or ours where those are made for the shape (`kernels.fla_triton`), and a cached token our
  fused step (`kernels.fla_decode`), unless `SLIMSTATE_KERNELS=fla`;
- fla counts packed documents on the host where it can (`flame.models.document_bounds`);
- this project's model classes (`flame.models`) are registered with transformers' Auto classes.

It imports fla and transformers, and nothing of torchtitan.
"""

import importlib
import importlib.util
import warnings
from pathlib import Path

from flame.errors import UserError

_KERNELS = str(Path(__file__).resolve().parent.parent / "kernels")


def _join_kernels() -> None:
    """Append our folder to the path of the package that is imported as `kernels`."""
    path = importlib.import_module("kernels").__path__
    if _KERNELS not in list(path):
        path.append(_KERNELS)


def _import_fla() -> None:
    """Import fla without its warning that it finds no GPU, since we give it a CPU path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Triton is not supported on current platform")
        importlib.import_module("fla.models")


def _check_choice_of_kernels() -> None:
    try:
        importlib.import_module("kernels.triton_support").chosen()
    except ValueError as error:
        raise UserError(str(error)) from error


def register() -> None:
    """Do what importing this module does.

    Raises:
        UserError: the package triton is missing, or `SLIMSTATE_KERNELS` names no kernels.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError("fla needs the package triton, also on a CPU: pip install triton")
    _join_kernels()
    _import_fla()
    _check_choice_of_kernels()
    importlib.import_module("kernels.fla_cpu").install()
    importlib.import_module("kernels.fla_triton").install()
    importlib.import_module("kernels.fla_decode").install()
    importlib.import_module("flame.models.document_bounds").count_on_host()
    importlib.import_module("flame.models").register_classes()


register()
