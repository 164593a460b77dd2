"""Model references: what a person writes for a model, resolved to folders on this machine.

A reference is a run folder (which means its latest whole step), a step folder, a Hugging Face
folder or a hub name. Resolving one reads small JSON files only and imports no torch, so every
command does it before work starts.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flame.checkpoint.foreign import GivenFiles, files_of, find_step, say_unverified
from flame.checkpoint.steps import broken_steps, is_whole, step_folder, whole_steps
from flame.data.hub import download, may_be_hub_name
from flame.errors import UserError
from flame.hugging_face.companions import tokenizer_folder
from flame.hugging_face.config_file import CONFIG_FILE, check_plain_folder, read_config
from flame.hugging_face.outer_model import OuterModel, text_config
from flame.lora.base import (
    ADAPTER_FILE,
    ADAPTER_WEIGHTS,
    BASE_FILE,
    check_chain,
    check_no_pickle,
    is_peft_folder,
    recorded_base,
)
from flame.process.output_checks import check_output, check_place
from flame.storage.checksums import METADATA
from flame.storage.json_file import read_object

if TYPE_CHECKING:
    from flame.checkpoint.source import TensorSource

CHECKPOINT_FOLDER = "checkpoint"
RECIPE_FILE = "recipe.toml"
TOKENIZER_CONFIG = "tokenizer_config.json"
Form = Literal["hf", "dcp"]
"""How a model lies on the disk: a Hugging Face folder, or a run folder with DCP checkpoints."""

_FORMS = "a run folder, a step folder, a Hugging Face folder or a hub name"


@dataclass(frozen=True)
class ModelReference:
    """A model that was found on this machine; its weights are not read yet."""

    folder: Path
    """The run folder or the Hugging Face folder."""
    step_folder: Path | None
    """The step of a run; None for a Hugging Face folder."""
    config: dict[str, Any]
    """The `config.json` of the model, or of the text model in it."""
    tokenizer: Path | None
    """The folder that holds the tokenizer, if there is one."""
    recipe: Path | None
    """The run's recipe, if it has one."""
    adapted_by: tuple[Path, ...] = ()
    """Folders of adapters that this model was looked up for, each the base of the one before it."""
    unverified: bool = False
    """Whether another program wrote the step: it has no hashes, and names of its own."""
    outer: OuterModel | None = None
    """The model of text and more whose text model this is, if its folder holds one."""

    @property
    def kind(self) -> Form:
        """`dcp` for a step of a run, `hf` for a Hugging Face folder."""
        return "hf" if self.step_folder is None else "dcp"

    @property
    def weights(self) -> Path:
        """The folder that holds the weights; a run's step, so it stays right as the run goes on."""
        return self.step_folder or self.folder

    @property
    def is_lora(self) -> bool:
        """Whether the weights are adapters on another model: a LoRA run or a peft folder."""
        is_run = self.step_folder is not None
        if self.unverified or not (self.folder / ADAPTER_FILE).is_file():
            return False
        return is_run or is_peft_folder(self.folder)

    def source(self) -> "TensorSource":
        """Return the model's tensors under stock names; adapters are merged with their base.

        Raises `UserError` if the weights, or the base of adapters, are missing or have changed.
        """
        from flame.lora.source import LoraSource

        own = self.own_source()
        if not self.is_lora:
            return own
        settings = read_object(self.folder / ADAPTER_FILE)
        return LoraSource(self._base_source(), own, settings, self.config)

    def own_source(self) -> "TensorSource":
        """Return the tensors in this folder: for a LoRA run or peft folder, the adapters alone."""
        from flame.checkpoint.dcp_source import DcpSource
        from flame.hugging_face.model_folder import open_folder
        from flame.hugging_face.safetensors_source import SafetensorsSource

        if self.step_folder is not None:
            source = DcpSource(self.step_folder, check="unverified" if self.unverified else "first")
            if self.unverified:
                say_unverified(self.step_folder)
            return source
        if self.is_lora:
            return SafetensorsSource(self.folder, ADAPTER_WEIGHTS)
        return open_folder(self.folder, self.config)

    def base(self) -> "ModelReference":
        """Return the model that adapters belong to; raise `UserError` if it cannot be found."""
        recorded, _ = recorded_base(self.folder)
        beside, above = self.folder / recorded, (*self.adapted_by, self.folder.resolve())
        try:
            found = _resolve(beside if beside.is_dir() else recorded, None, above)
        except UserError as error:
            if len(above) > 1:
                raise
            raise UserError(
                f"the adapters of {self.folder} need their base model {recorded}: {error}"
            ) from error
        check_chain(above, found.folder.resolve())
        return replace(found, adapted_by=above)

    def _base_source(self) -> "TensorSource":
        from flame.checkpoint.fingerprint import fingerprint

        base, (_, recorded) = self.base(), recorded_base(self.folder)
        source = base.source()
        if recorded is not None and fingerprint(base.config, source) != recorded:
            raise UserError(
                f"{base.weights} is not the model that the adapters of {self.folder} were trained "
                f"on: it has changed since; name the right step in {self.folder / BASE_FILE}"
            )
        return source


def resolve(
    reference: str | Path, step: int | None = None, given: GivenFiles | None = None
) -> ModelReference:
    """Find the model that `reference` names.

    Args:
        reference: a run folder, step folder, Hugging Face folder or hub name.
        step: a step of a run instead of its latest.
        given: files for a step that another program wrote; not used for other models.

    Raises:
        UserError: there is no such folder, config or whole step, or no network for a hub name.
    """
    return _resolve(reference, step, (), given)


def _resolve(
    reference: str | Path,
    step: int | None,
    above: tuple[Path, ...],
    given: GivenFiles | None = None,
) -> ModelReference:
    path = Path(reference).expanduser()
    if path.is_dir():
        path = path.absolute()
        foreign = find_step(path, step)
        if foreign is not None:
            run, config, tokenizer = files_of(foreign, given or GivenFiles())
            return ModelReference(run, foreign, config, tokenizer, None, unverified=True)
        return _resolve_folder(path, step, above)
    if path.exists() or not may_be_hub_name(str(reference)):
        problem = f"it is a file, a model is {_FORMS}" if path.exists() else "no such folder"
        raise UserError(f"no model at {reference}: {problem}")
    folder = download(str(reference))
    return _resolve_hf(folder, step, above)


def check_destination(
    reference: ModelReference, dst: Path, overwrite: bool, inside_source: bool = False
) -> None:
    """Raise `UserError` if the output `dst` cannot be written, or would harm its source.

    `overwrite` allows an existing output; `inside_source` allows one inside the model's folder.
    """
    check_place(dst, None if inside_source else reference.folder)
    if reference.weights.resolve().is_relative_to(dst.resolve()):
        raise UserError(f"output {dst} would replace the model {reference.weights}: choose another")
    check_output(dst, overwrite)


def _resolve_folder(path: Path, step: int | None, above: tuple[Path, ...]) -> ModelReference:
    if (path / METADATA).exists() or re.fullmatch(r"step-\d+", path.name):
        return _resolve_step(path, step)
    if (path / CHECKPOINT_FOLDER).is_dir():
        return _resolve_run(path, step)
    if path.name == CHECKPOINT_FOLDER and (path.parent / CONFIG_FILE).is_file():
        return _resolve_run(path.parent, step)
    return _resolve_hf(path, step, above)


def _resolve_run(run: Path, step: int | None) -> ModelReference:
    config = read_config(run / CONFIG_FILE)
    folder = run / CHECKPOINT_FOLDER
    steps = whole_steps(folder)
    if not steps:
        broken = ", ".join(broken_steps(folder))
        advice = f"{broken} half-written or damaged, copy the run again or use another"
        raise UserError(f"{run} has no whole step: {advice if broken else 'train it first'}")
    if step is not None and step not in steps:
        raise UserError(f"{run} has no whole step {step}: choose from {', '.join(map(str, steps))}")
    return _of_run(run, step_folder(folder, steps[-1] if step is None else step), config)


def _resolve_step(path: Path, step: int | None) -> ModelReference:
    if step is not None:
        raise UserError(f"{path} is a step already: leave out the step number {step}")
    run = path.parent.parent if path.parent.name == CHECKPOINT_FOLDER else path.parent
    if not is_whole(path):
        others = ", ".join(f"step-{number}" for number in whole_steps(path.parent))
        known = f": whole are {others}" if others else ""
        raise UserError(f"{path} is half-written or damaged{known}")
    return _of_run(run, path, read_config(run / CONFIG_FILE))


def _of_run(run: Path, step: Path, config: dict[str, Any]) -> ModelReference:
    recipe = run / RECIPE_FILE if (run / RECIPE_FILE).is_file() else None
    return ModelReference(run, step, config, tokenizer_folder(run), recipe)


def _resolve_hf(folder: Path, step: int | None, above: tuple[Path, ...]) -> ModelReference:
    if step is not None:
        raise UserError(f"{folder} is a Hugging Face folder: it has no step {step}")
    file = folder / CONFIG_FILE
    if not file.is_file() and is_peft_folder(folder):
        if above:
            check_chain(above, folder.resolve())
        found = ModelReference(folder, None, {}, tokenizer_folder(folder), None, above)
        base = found.base()
        return replace(found, config=base.config, tokenizer=found.tokenizer or base.tokenizer)
    if not file.is_file():
        check_no_pickle(folder)
    config = read_config(file)
    check_plain_folder(folder)
    if not any(folder.glob("*.safetensors*")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} has a {CONFIG_FILE} but neither safetensors nor checkpoints")
    text, outer = text_config(config), OuterModel(folder, config)
    if text is None:
        return ModelReference(folder, None, config, tokenizer_folder(folder), None)
    return ModelReference(folder, None, text, tokenizer_folder(folder), None, outer=outer)
