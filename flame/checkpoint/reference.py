"""Model references: what a person writes for a model, resolved to folders on this machine.

A run folder (its latest whole step), a step folder, a Hugging Face folder or a hub name. Resolving
reads small JSON files only and imports no torch, so every command does it before work starts.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flame.checkpoint.steps import broken_steps, is_whole, step_folder, whole_steps
from flame.errors import UserError, first_line
from flame.process.atomic_output import check_output
from flame.storage.checksums import METADATA
from flame.storage.json_file import read_object

if TYPE_CHECKING:
    from flame.checkpoint.source import TensorSource

CHECKPOINT_FOLDER = "checkpoint"
CONFIG_FILE = "config.json"
RECIPE_FILE = "recipe.toml"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZER_PROOF = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KINDS = "a run folder, a step folder, a Hugging Face folder or a hub name"


@dataclass(frozen=True)
class ModelReference:
    """A model on this machine, found but not read."""

    kind: Literal["dcp", "hf"]
    folder: Path
    """The run folder or the Hugging Face folder."""
    step_folder: Path | None
    run_folder: Path | None
    config: dict[str, Any]
    """The model's `config.json`."""
    tokenizer: Path | None
    """The folder that holds a tokenizer."""
    recipe: Path | None

    @property
    def weights(self) -> Path:
        """The folder that holds the weights: a name that stays right when the run trains on."""
        return self.step_folder or self.folder

    @property
    def is_lora(self) -> bool:
        """Whether the step, or the peft folder, holds adapters on another model."""
        is_run = self.run_folder is not None
        return (self.folder / ADAPTER_FILE).is_file() and (is_run or _is_peft_folder(self.folder))

    def source(self) -> "TensorSource":
        """The model's tensors in stock names; those of a LoRA run merged with their base."""
        from flame.checkpoint.lora_source import LoraSource

        own = self.own_source()
        if not self.is_lora:
            return own
        config = read_object(self.folder / ADAPTER_FILE)
        return LoraSource(self._base_source(), own, config)

    def own_source(self) -> "TensorSource":
        """The tensors that lie here: of a LoRA run or a peft folder the adapters alone."""
        from flame.checkpoint.source import SAFETENSORS_FILE, DcpSource, SafetensorsSource

        if self.step_folder is not None:
            return DcpSource(self.step_folder)
        return SafetensorsSource(self.folder, ADAPTER_WEIGHTS if self.is_lora else SAFETENSORS_FILE)

    def base(self) -> "ModelReference":
        """The model that the adapters belong to."""
        recorded, _ = _recorded_base(self.folder)
        beside = self.folder / recorded
        try:
            return resolve(beside if beside.is_dir() else recorded)
        except UserError as error:
            raise UserError(
                f"the adapters of {self.folder} need their base model {recorded}: {error}"
            ) from error

    def _base_source(self) -> "TensorSource":
        from flame.checkpoint.fingerprint import fingerprint

        base = self.base()
        source = base.source()
        _, recorded = _recorded_base(self.folder)
        if recorded is not None and fingerprint(base.config, source) != recorded:
            raise UserError(
                f"{base.weights} is not the model that the adapters of {self.folder} were trained "
                f"on: it has changed since; name the right step in {self.folder / BASE_FILE}"
            )
        return source


def resolve(reference: str | Path, step: int | None = None) -> ModelReference:
    """Find the model that `reference` names; `step` picks one of a run instead of the latest.

    Raises:
        UserError: there is no such folder, config or whole step, or no network for a hub name.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return _resolve_folder(path.absolute(), step)
    if path.exists():
        raise UserError(f"{reference} is a file: a model is {_KINDS}")
    if not _may_be_hub_name(str(reference)):
        raise UserError(f"no model at {reference}: no such folder")
    return _resolve_hugging_face(_download(str(reference)), step)


def check_destination(
    reference: ModelReference, dst: Path, overwrite: bool, inside_source: bool = False
) -> None:
    """Refuse an output that exists, cannot be written, or overlaps the source's folder."""
    check_output(dst, overwrite, None if inside_source else reference.folder)
    if reference.weights.resolve().is_relative_to(dst.resolve()):
        raise UserError(f"output {dst} would replace the model {reference.weights}: choose another")


def read_config(path: Path) -> dict[str, Any]:
    """A model's `config.json`; `UserError` if it is missing, not JSON or names no family."""
    config = read_object(path, missing=f"{path.parent} has no {path.name}: a model is {_KINDS}")
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} has no model_type: it is not a model's configuration")
    return config


def vocabulary_size(config: dict[str, Any]) -> int:
    """`vocab_size` of a `config.json`; `UserError` if it has none."""
    size = config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"config.json: vocab_size is {size!r}, expected a positive integer")
    return size


def _resolve_folder(path: Path, step: int | None) -> ModelReference:
    if (path / METADATA).exists() or re.fullmatch(r"step-\d+", path.name):
        return _resolve_step(path, step)
    if (path / CHECKPOINT_FOLDER).is_dir():
        return _resolve_run(path, step)
    if path.name == CHECKPOINT_FOLDER and (path.parent / CONFIG_FILE).is_file():
        return _resolve_run(path.parent, step)
    return _resolve_hugging_face(path, step)


def _is_peft_folder(folder: Path) -> bool:
    return (folder / ADAPTER_FILE).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def _recorded_base(folder: Path) -> tuple[str, str | None]:
    """Reference and fingerprint of the base of the adapters in `folder`.

    peft's own folders name a base and have no fingerprint.
    """
    if (folder / BASE_FILE).is_file() or not _is_peft_folder(folder):
        path, base = folder / BASE_FILE, read_object(folder / BASE_FILE)
        recorded, mark = base.get("reference"), base.get("fingerprint")
    else:
        path = folder / ADAPTER_FILE
        recorded, mark = read_object(path).get("base_model_name_or_path"), None
    if not isinstance(recorded, str):
        raise UserError(f"{path} names no base model")
    return recorded, mark


def _resolve_run(run: Path, step: int | None) -> ModelReference:
    config = read_config(run / CONFIG_FILE)
    folder = run / CHECKPOINT_FOLDER
    steps = whole_steps(folder)
    if not steps:
        raise UserError(f"{run} has no whole step{_half_written(folder)}")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"{run} has no whole step {step}: choose from {known}")
    return _of_run(run, step_folder(folder, steps[-1] if step is None else step), config)


def _resolve_step(path: Path, step: int | None) -> ModelReference:
    if step is not None:
        raise UserError(f"{path} is a step already: leave out the step number {step}")
    run = path.parent.parent if path.parent.name == CHECKPOINT_FOLDER else path.parent
    config = read_config(run / CONFIG_FILE)
    if not is_whole(path):
        raise UserError(f"{path} is half-written or damaged{_other_steps(path.parent)}")
    return _of_run(run, path, config)


def _of_run(run: Path, step: Path, config: dict[str, Any]) -> ModelReference:
    recipe = run / RECIPE_FILE
    return ModelReference(
        kind="dcp",
        folder=run,
        step_folder=step,
        run_folder=run,
        config=config,
        tokenizer=_tokenizer(run),
        recipe=recipe if recipe.is_file() else None,
    )


def _resolve_hugging_face(folder: Path, step: int | None) -> ModelReference:
    if step is not None:
        raise UserError(f"{folder} is a Hugging Face folder: it has no step {step}")
    if _is_peft_folder(folder) and not (folder / CONFIG_FILE).is_file():
        found = ModelReference("hf", folder, None, None, {}, _tokenizer(folder), None)
        base = found.base()
        return replace(found, config=base.config, tokenizer=found.tokenizer or base.tokenizer)
    config = read_config(folder / CONFIG_FILE)
    if not any(folder.glob("*.safetensors*")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} has a {CONFIG_FILE} but neither safetensors nor checkpoints")
    return ModelReference("hf", folder, None, None, config, _tokenizer(folder), None)


def _tokenizer(folder: Path) -> Path | None:
    return folder if any((folder / name).is_file() for name in _TOKENIZER_PROOF) else None


def _half_written(folder: Path) -> str:
    names = broken_steps(folder)
    if not names:
        return ": train it first"
    return f": {', '.join(names)} half-written or damaged, copy the run again or use another"


def _other_steps(folder: Path) -> str:
    steps = whole_steps(folder)
    return f": whole are {', '.join(f'step-{step}' for step in steps)}" if steps else ""


def _may_be_hub_name(reference: str) -> bool:
    parent = Path(reference).parent
    return bool(_HUB_NAME.fullmatch(reference)) and (str(parent) == "." or not parent.is_dir())


def _download(name: str) -> Path:
    """The local snapshot of a hub model, brought up to date where there is a network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    from flame.data.hub import hub_problem

    configs = [CONFIG_FILE, ADAPTER_FILE, "generation_config.json"]
    patterns = [*configs, "*.safetensors*", *TOKENIZER_FILES]
    problem = hub_problem()
    try:
        folder = snapshot_download(name, allow_patterns=patterns, local_files_only=bool(problem))
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"no model {name}: no such folder, and not to be had from the hub "
            f"({problem or first_line(error)}); give a local folder"
        ) from error
    return Path(folder)
