"""Writing the pruned checkpoint that a plan makes of a model.

It streams: a tensor is read, sliced, written and forgotten, so memory holds one. Optimizer moments
have the shape of their parameter and are sliced like it; step, schedules, counters and the loader's
state are kept, so that a pruned run trains on from where it stood. A LoRA run is transformed as the
merged model it stands for, without training state, which belongs to the adapters.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from flame.checkpoint.convert import (
    Read,
    check_space,
    complete_config,
    copy_beside,
    copy_recipe,
    made_from,
    write_run,
)
from flame.checkpoint.dcp_source import TRAINING_PREFIXES
from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import CHECKPOINT_FOLDER, CONFIG_FILE, Form, ModelReference
from flame.checkpoint.save import save_step
from flame.checkpoint.source import source_infos, total_bytes
from flame.checkpoint.streaming import say_streaming
from flame.hugging_face.model_card import write_model_card
from flame.hugging_face.put_back import outer_of, write_stock_folder
from flame.hugging_face.stock_form import stock_form
from flame.storage.safetensors_file import SafetensorsFile
from pruning.adapters.interface import Config
from pruning.planning.plan import Plan, check_fingerprint
from pruning.planning.plan_file import (
    PLAN_FILE,
    TENSORS_FILE,
    checked_tensors,
    plan_text,
    with_saved_tensors,
)
from pruning.transform.model_reader import ModelReader, small_files
from pruning.transform.sliced_source import SlicedSource
from pruning.transform.slices import slices_of


def write_pruned(
    plan: Plan,
    reference: ModelReference,
    folder: Path,
    form: Form,
    destination: Path,
    plan_folder: Path | None = None,
) -> None:
    """Write what `plan` makes of a model into the existing `folder`, the plan along with it.

    One process does it alone; the plan has been checked against the model.

    Args:
        plan: the channels to keep.
        reference: the model.
        folder: becomes a run folder (`dcp`) or a Hugging Face folder (`hf`).
        form: which of the two.
        destination: the name that the folder will get; its recipe says it.
        plan_folder: where the plan's new tensors lie, if it has any.

    Raises:
        UserError: a tensor is missing, not finite or damaged, or the disk is too small.
    """
    reader = ModelReader(reference, training_state=form == "dcp")
    if plan.new_tensors:
        plan, plan_folder = with_saved_tensors(plan, folder / TENSORS_FILE), folder
    replaced = _copy_tensors(plan, plan_folder, folder)
    sliced = SlicedSource(reader.source, slices_of(plan, reference.config), replaced)
    check_space(destination, total_bytes(sliced))
    say_streaming(source_infos(reader.source), total_bytes(sliced))
    copy_beside(reference, folder)
    config = complete_config(plan.config_after)
    (folder / PLAN_FILE).write_text(plan_text(plan))
    read = reader.explained(sliced.read)
    if reader.state is not None:
        _write_training_state(config, reference, reader, sliced, read, folder)
    elif form == "hf":
        write_stock_folder(folder, outer_of(reference), config, source_infos(sliced), read)
        write_model_card(folder, destination.name, config, made_from(reference, folder))
    else:
        write_run(folder, config, source_infos(sliced), read)
    reader.finish()
    if form == "dcp":
        copy_recipe(reference, folder, destination)


def check_model(plan: Plan, reference: ModelReference, name: str = "the plan") -> None:
    """Raise UserError unless `plan` was made from this very model, as far as samples of it tell."""
    reader = ModelReader(reference, training_state=False, sampled=True)
    found = fingerprint(reference.config, reader.source)
    if found != plan.fingerprint:
        reader.finish()
    check_fingerprint(plan, found, name)


def _write_training_state(
    config: Config,
    reference: ModelReference,
    reader: ModelReader,
    sliced: SlicedSource,
    read: Read,
    folder: Path,
) -> None:
    """Write a step with the number, the schedules and the loader's state of the reference's.

    Raises UserError if the model's tensors are not those that the config leads to.
    """
    step, stored = reference.step_folder, reader.state
    assert step is not None and stored is not None
    own = [name for name in sliced.names() if not name.startswith(TRAINING_PREFIXES)]
    stock_form(config).check({name: sliced.info(name) for name in own})
    state: dict[str, Any] = {name: sliced.info(name).promise() for name in stored.stored_order()}
    state |= reader.values()
    number = int(step.name.removeprefix("step-"))
    checkpoints = folder / CHECKPOINT_FOLDER
    save_step(state, checkpoints, number, small_files(step), read=read, alone=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n")


def _copy_tensors(plan: Plan, plan_folder: Path | None, folder: Path) -> SafetensorsFile | None:
    """The plan's new tensors, copied beside the plan's copy; None without any."""
    if plan.tensors_file is None:
        return None
    path = checked_tensors(plan.tensors_file, plan_folder or folder)
    if path.parent != folder:
        shutil.copyfile(path, folder / path.name)
    return SafetensorsFile(path)
