"""Converting models between DCP and Hugging Face, bit for bit, with one tensor in memory.

What belongs to the model is copied too: tokenizer, templates, generation config, the plan that it
was pruned by. A LoRA run is merged with its base.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from flame.checkpoint.dcp_source import DcpSource
from flame.checkpoint.reference import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    RECIPE_FILE,
    ModelReference,
    check_destination,
    resolve,
)
from flame.checkpoint.save import save_step
from flame.checkpoint.source import Read, TensorInfo, source_infos, total_bytes
from flame.checkpoint.streaming import say_streaming
from flame.errors import UserError
from flame.hugging_face.companions import (
    companions,
    copy_companions,
    copy_tokenizer,
    is_tokenizer_part,
)
from flame.hugging_face.model_card import write_model_card
from flame.hugging_face.model_folder import Recorded, check_ties
from flame.hugging_face.outer_model import OuterModel
from flame.hugging_face.put_back import check_around, outer_of, write_stock_folder
from flame.hugging_face.stock_form import stock_form
from flame.lora.peft_folder import (
    base_name,
    check_adapters,
    loading_line,
    write_adapters,
)
from flame.process.atomic_output import replacing_folder
from flame.storage.json_file import read_object_if_any, write_object

Format = Literal["hf", "dcp", "peft"]
PLAN_FILE = "plan.json"
"""In a pruned model's folder: the plan that it was pruned by."""


def convert(
    src: str | Path | ModelReference,
    dst: Path,
    to: Format,
    overwrite: bool = False,
    inside_source: bool = False,
    base: str | None = None,
    within: OuterModel | None = None,
) -> str:
    """Write the model that `src` names as a Hugging Face folder, a run folder or a peft folder.

    Args:
        src: any model reference, or the name of one.
        dst: the folder to write; a run folder gets the model as `checkpoint/step-0`.
        to: `"hf"`, `"dcp"`, or `"peft"` for the adapters of a LoRA run alone.
        overwrite: replace an existing `dst`.
        inside_source: allow `dst` in the source's folder, as a run's own `merged/` is.
        base: with `"peft"`, what to call the base model (`flame.lora.peft_folder.base_name`).
        within: with `"hf"`, the model of text and more that the text model is put back into
            (default: the one it was read from, if it was).

    Returns:
        A line that says what was read and written.

    Raises:
        UserError: the source is damaged, the output is refused, or the disk is too small.
    """
    dst = Path(dst).absolute()
    reference = src if isinstance(src, ModelReference) else resolve(src)
    check_destination(reference, dst, overwrite, inside_source)
    if to == "peft":
        check_adapters(reference, base)
        source = reference.own_source()
        check_space(dst, total_bytes(source))
        with replacing_folder(dst, overwrite) as folder:
            copied = copy_companions(reference.folder, folder)
            write_adapters(folder, reference, base_name(reference, base), str(dst))
        said = f"the adapters of {_origin(reference)}, {_contents(source_infos(source), copied)}"
        return f"{said}\nload both: {loading_line(dst)}"
    if within is None:
        check_around(reference, to)
    config = complete_config(reference.config)
    source = reference.source()
    infos, size = source_infos(source), total_bytes(source)
    check_space(dst, size)
    say_streaming(infos, size)
    with replacing_folder(dst, overwrite) as folder:
        copied = copy_beside(reference, folder) + copy_plan(reference.folder, folder)
        if to == "hf":
            write_stock_folder(folder, within or outer_of(reference), config, infos, source.read)
            write_model_card(folder, dst.name, config, made_from(reference, folder))
        else:
            write_run(folder, config, infos, source.read)
            copy_recipe(reference, folder, dst)
    return f"{_origin(reference)} as {_FORMS[to]}, {_contents(infos, copied)}"


_FORMS = {"hf": "a Hugging Face folder", "dcp": "a run folder with step 0"}


def made_from(reference: ModelReference, folder: Path) -> list[str]:
    """Return sentences for a model card: what a folder was made from and, if so, pruned by."""
    merged = ", its adapters merged with their base," if reference.is_lora else ""
    lines = [f"Written by `slimstate` from {_origin(reference)}{merged} and compared on the disk."]
    plan = read_object_if_any(folder / PLAN_FILE)
    method, budget = plan.get("method"), plan.get("budget")
    if isinstance(method, dict) and isinstance(budget, dict):
        asked = ", ".join(f"{key} {value}" for key, value in sorted(budget.items()) if value)
        lines.append(f"Pruned by the method {method.get('name')} ({asked}); see `{PLAN_FILE}`.")
    return lines


def copy_beside(reference: ModelReference, folder: Path) -> list[str]:
    """Copy what belongs to a model into `folder`, and return the names of the copies.

    Beside another program's step lie the files of its run; of them only the tokenizer is copied.
    """
    if not reference.unverified:
        return copy_companions(reference.folder, folder)
    if reference.tokenizer is None:
        return []
    copy_tokenizer(reference.tokenizer, folder)
    return sorted(path.name for path in companions(folder) if is_tokenizer_part(path))


def _origin(reference: ModelReference) -> str:
    """Say which model a reference is, by the names of its folders alone."""
    if reference.step_folder is None:
        return f"the folder `{reference.folder.name}`"
    unverified = " (unverified: it has no checksums)" if reference.unverified else ""
    return f"{reference.step_folder.name} of the run `{reference.folder.name}`{unverified}"


def _contents(infos: Mapping[str, TensorInfo], copied: list[str]) -> str:
    size = sum(info.nbytes for info in infos.values())
    beside = f", with {', '.join(copied)}" if copied else ""
    return f"{len(infos)} tensors, {size / 1e6:,.1f} MB{beside}"


def check_space(dst: Path, needed: int) -> None:
    """Raise `UserError` unless the file system of `dst` has `needed` bytes free."""
    parent = dst.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{dst} needs {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free")


def write_run(
    folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Read
) -> None:
    """Write `config.json` and `checkpoint/step-0`, which holds the model alone.

    Arguments and errors are those of `write_hf`. A tied output embedding is written too, because
    trainers save it and look for it when they resume.
    """
    form = stock_form(config)
    form.check(infos)
    check_ties(form, infos, read)
    stored = {name: name for name in infos}
    for pair in form.ties.items():
        for name, other in (pair, pair[::-1]):
            if name not in infos and other in infos:
                stored[name] = other
    promises = {name: infos[place].promise() for name, place in stored.items()}
    record = Recorded(lambda name: read(stored[name]))
    step = save_step(promises, folder / CHECKPOINT_FOLDER, 0, read=record, alone=True)
    write_object(folder / CONFIG_FILE, config, sort_keys=True)
    record.check(DcpSource(step), form.ties)


def copy_plan(folder: Path, into: Path) -> list[str]:
    """Copy the plan in `folder`, and the tensors that it names, into `into`; return their names."""
    plan = folder / PLAN_FILE
    if not plan.is_file():
        return []
    replaced = read_object_if_any(plan).get("replaced")
    tensors = Path(str(replaced.get("file"))).name if isinstance(replaced, dict) else ""
    names = [name for name in (PLAN_FILE, tensors) if name and (folder / name).is_file()]
    for name in names:
        shutil.copyfile(folder / name, into / name)
    return names


def copy_recipe(reference: ModelReference, folder: Path, dst: Path) -> None:
    """Copy a run's recipe, if it has one, into `folder`, as the recipe of a run in `dst`.

    The copy names `dst` and what is in it; it asks for no adapters and for no model to start from.
    """
    if reference.recipe is None:
        return
    from flame.config import job_from_tables
    from flame.recipe import read_tables, recipe_text
    from flame.recipe.paths import in_run_folder

    job = job_from_tables(read_tables(reference.recipe))
    job.lora = type(job.lora)()
    job.model.init = ""
    job = in_run_folder(job, dst, own_tokenizer=reference.tokenizer is not None)
    (folder / RECIPE_FILE).write_text(recipe_text(job))


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with the name of its stock class, which some loaders look for.

    The name of a weight file of its own is left out, because the weights are written anew. Raises
    `UserError` if neither transformers nor fla knows the model family.
    """
    from transformers import AutoModelForCausalLM

    from flame.model import stock_config

    config = {key: value for key, value in config.items() if key != "transformers_weights"}
    stock = stock_config(config)
    if config.get("architectures"):
        return config
    model_class = AutoModelForCausalLM._model_mapping.get(type(stock), None)
    return {**config, "architectures": [model_class.__name__]} if model_class else config
