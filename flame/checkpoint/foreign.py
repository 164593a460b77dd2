"""DCP steps that other programs wrote: found, and used with a config and a tokenizer given."""

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.checkpoint.steps import foreign_steps, is_foreign, step_folder
from flame.errors import UserError
from flame.hugging_face.companions import tokenizer_folder
from flame.hugging_face.config_file import CONFIG_FILE, read_config
from flame.options import option
from flame.storage.checksums import CHECKSUMS, METADATA

if TYPE_CHECKING:
    from flame.checkpoint.reference import ModelReference


GIVEN = "a step of torchtitan or flame"
"""The heading of these options in a `--help`."""


@dataclass(frozen=True)
class GivenFiles:
    """Config and tokenizer of a DCP step that torchtitan or flame wrote."""

    model_config: Path | None = option(
        None,
        "config.json of a DCP step that torchtitan or flame wrote; default: the one beside it",
        metavar="FILE",
    )
    model_tokenizer: Path | None = option(
        None, "tokenizer of such a step; default: the one beside its config", metavar="FOLDER"
    )

    def resolve(self, name: str | Path) -> "ModelReference":
        """Find the model that `name` names, by the help of these files.

        Raises:
            UserError: as `flame.checkpoint.reference.resolve`, or the model needs no such files.
        """
        from flame.checkpoint.reference import resolve

        found = resolve(name, given=self)
        self.check_needed([found])
        return found

    def check_needed(self, references: "list[ModelReference]") -> None:
        """Raise `UserError` if files are given, and none of the models was written elsewhere."""
        for option_name, path in (
            ("--model-config", self.model_config),
            ("--model-tokenizer", self.model_tokenizer),
        ):
            if path is not None and not any(found.unverified for found in references):
                raise UserError(
                    f"{option_name} {path} is for a DCP step of another program, and "
                    f"{references[0].folder} has its own files: leave it out"
                )


def find_step(path: Path, step: int | None) -> Path | None:
    """Return the step of another program that a folder is or, at last, holds; None for others."""
    from flame.checkpoint.reference import CHECKPOINT_FOLDER

    if (path / METADATA).exists():
        return path if step is None and is_foreign(path) and not _is_our_run(path.parent) else None
    for folder in (path / CHECKPOINT_FOLDER, path):
        steps = [] if _is_our_run(folder) else foreign_steps(folder)
        if step is not None and steps and step not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"{path} has no step {step}: choose from {known}")
        if steps:
            return step_folder(folder, steps[-1] if step is None else step)
    return None


def _is_our_run(checkpoints: Path) -> bool:
    from flame.checkpoint.reference import RECIPE_FILE

    return any((folder / RECIPE_FILE).is_file() for folder in (checkpoints, checkpoints.parent))


def files_of(step: Path, given: GivenFiles) -> tuple[Path, dict[str, Any], Path | None]:
    """Return the run folder of another program's step, its config, and its tokenizer's folder.

    Raises:
        UserError: there is no config, or no tokenizer in the folder that is given for one.
    """
    from flame.checkpoint.reference import CHECKPOINT_FOLDER

    run = step.parent.parent if step.parent.name == CHECKPOINT_FOLDER else step.parent
    path = given.model_config or run / CONFIG_FILE
    path = path / CONFIG_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"{step} is of another program, and {path} does not exist: give --model-config FILE "
            "(training: --model.config), or put a config.json there"
        )
    config = read_config(path)
    wanted = given.model_tokenizer
    tokenizer = (
        tokenizer_folder(wanted)
        if wanted
        else tokenizer_folder(run) or tokenizer_folder(path.parent)
    )
    if wanted and tokenizer is None:
        raise UserError(f"--model-tokenizer {wanted} holds no tokenizer: give a folder with one")
    return run, config, tokenizer


@cache
def say_unverified(step: Path) -> None:
    """Warn once a process, on rank 0, that nothing can tell whether a step is damaged."""
    if int(os.environ.get("RANK", "0")) == 0:
        text = f"{step} has no {CHECKSUMS} of slimstate: it is read unverified"
        print(f"slimstate: warning: {text}", file=sys.stderr, flush=True)
