"""What adapters are scaled by: the numbers of `[lora]`, or of the adapters that a job starts from.

Adapters are trained for one scale: under another they are other adapters. So a job that starts from
adapters takes theirs, and a run that goes on must keep its own.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.lora.base import ADAPTER_FILE
from flame.lora.config import AdapterConfig
from flame.storage.json_file import read_object

_NAMES = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}
"""Options of peft, and their names in `[lora]`."""


def scaling(lora: Any) -> dict[str, Any]:
    """Return the options of peft's `LoraConfig` that set ranks and scales.

    Args:
        lora: recipe section `[lora]` (`flame.config.Lora`).

    Raises:
        UserError: `lora.init` has no readable configuration of adapters.
    """
    if lora.init:
        content = _start(lora).content
    else:
        content = {peft: getattr(lora, own) for peft, own in _NAMES.items()}
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    return {name: content[name] for name in names if name in content}


def exact_patterns(lora: Any, modules: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return `rank_pattern` and `alpha_pattern` of `lora.init` with a key for each of `modules`.

    peft would match the file's own expressions, which may take for ever, without a bound.
    """
    if not lora.init:
        return {}
    config = _start(lora)
    # peft takes the first key that the end of a name matches: a longer name goes first.
    names = {re.escape(name): name for name in sorted(modules, key=len, reverse=True)}
    return {
        "rank_pattern": {key: config.rank(name) for key, name in names.items()},
        "alpha_pattern": {key: config.alpha(name) for key, name in names.items()},
    }


def check_start(lora: Any) -> None:
    """Raise `UserError` if adapters of the kind of `lora.init` cannot be trained on.

    Those of PiSSA, for one, need a base that peft changes when it loads them.
    """
    config = _start(lora)
    if not config.row_by_row or config.content.get("lora_bias"):
        raise UserError(
            f"lora.init {lora.init} holds adapters whose update is not W + scale * B A alone "
            f"(init_lora_weights {config.start}, or a variant of LoRA): merge them with `slimstate "
            "convert --to hf` and give the result as --init"
        )
    rank = config.content.get("r", 8)
    if rank != lora.rank:
        raise UserError(f"lora.rank is {lora.rank}, the adapters of lora.init have rank {rank}")
    if config.is_dora != lora.dora:
        raise UserError(f"lora.dora is {lora.dora}, and lora.init's adapters have {config.is_dora}")


def check_recorded(lora: Any, run: Path) -> None:
    """Raise `UserError` if the adapters in the folder `run` were trained with another scale.

    A run without steps has none to protect. `lora` is recipe section `[lora]`.
    """
    path = run / ADAPTER_FILE
    if not path.is_file():
        return
    recorded, asked = read_object(path), {"use_dora": lora.dora, **scaling(lora)}
    for option, value in asked.items():
        before = recorded.get(option)
        if (before or 0) != (value or 0):
            raise UserError(
                f"lora.{_NAMES.get(option, option)} is {value}, and the adapters in {run} were "
                f"trained with {before}: leave it as it was, or give another job.dump_folder"
            )


def used(lora: Any) -> Any:
    """Return section `[lora]` with the alpha and `rslora` that are used: those of `lora.init`."""
    if not (lora.rank > 0 and lora.init):
        return lora
    options = scaling(lora)
    alpha, rslora = options["lora_alpha"], options.get("use_rslora", False)
    return replace(lora, alpha=float(alpha), rslora=rslora)


def _start(lora: Any) -> AdapterConfig:
    return AdapterConfig(read_object(resolve(lora.init).folder / ADAPTER_FILE))
