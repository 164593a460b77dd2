"""The transform: a plan and a checkpoint make the pruned checkpoint.

It streams: a tensor is read, sliced, written and forgotten, so memory holds one. Optimizer moments
have the shape of their parameter and are sliced like it; step, schedules, counters and the loader's
state are kept, so that a pruned run trains on from where it stood. A LoRA run is transformed as the
merged model it stands for, without training state, which belongs to the adapters.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flame.checkpoint.convert import (
    Read,
    check_space,
    complete_config,
    copy_companions,
    copy_recipe,
    write_hf,
    write_run,
)
from flame.checkpoint.dcp_source import DcpSource
from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import CHECKPOINT_FOLDER, CONFIG_FILE, Form, ModelReference
from flame.checkpoint.source import TensorInfo, TensorSource, total_bytes
from flame.checkpoint.steps import METADATA, save_step
from flame.errors import UserError
from flame.storage.checksums import check_file, hash_file, read_checksums
from flame.storage.json_file import write_object
from flame.storage.safe_reader import Check
from flame.storage.safetensors_file import open_safetensors
from pruning.adapters.interface import Config
from pruning.planning.choose import check_tensor_finite
from pruning.planning.plan import Plan, check_fingerprint
from pruning.planning.plan_file import PLAN_FILE, PROJECTED_FILE, plan_text, with_saved_tensors
from pruning.transform.slices import Cut, Cuts, cut_tensor, cuts_of

OPTIMIZER_STATE = "optimizer.state."
"""Beginning of the names of optimizer entries in a step: then the parameter's, then the entry's."""


class SlicedSource:
    """A source as it is after a plan: sliced, replaced where the plan says so, and finite.

    Tensors that the plan does not touch come out as they are, bit for bit.

    Args:
        source: the tensors before, those of the optimizer among them or not.
        cuts: from `pruning.transform.slices.cuts_of`.
        replaced: handle of a safetensors file, whose tensors take the place of sliced ones.
    """

    def __init__(self, source: TensorSource, cuts: Cuts, replaced: Any = None) -> None:
        self._source, self._cuts, self._replaced = source, cuts, replaced
        self._names = set(source.names())
        self._new = set(replaced.keys()) if replaced is not None else set()
        self._check_names()

    def names(self) -> list[str]:
        return sorted(self._names)

    def info(self, name: str) -> TensorInfo:
        info = self._source.info(name)
        shape = list(info.shape)
        for cut in self._cuts_of(name):
            shape[cut.dim] = len(cut.kept)
        return TensorInfo(tuple(shape), info.dtype)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor after the plan, or rows of it; UserError if it is not finite."""
        if parameter_of(name) in self._new:
            tensor = self._read_new(name)
        else:
            tensor = self._read_sliced(name)
        check_tensor_finite(name, tensor)
        return tensor if rows is None else tensor[rows]

    def _read_sliced(self, name: str) -> Tensor:
        return cut_tensor(name, self._source.read(name), self._cuts_of(name))

    def _read_new(self, name: str) -> Tensor:
        info = self.info(name)
        if parameter_of(name) != name:
            # Moments of other channels than these: the optimizer begins anew, counting from zero.
            return torch.zeros(info.shape, dtype=info.dtype)
        tensor = self._replaced.get_tensor(name)
        if tuple(tensor.shape) != info.shape:
            raise UserError(
                f"the plan replaces {name} by shape {tuple(tensor.shape)}, its channels leave "
                f"{info.shape}"
            )
        return tensor.to(info.dtype)

    def _cuts_of(self, name: str) -> tuple[Cut, ...]:
        parameter = parameter_of(name)
        if parameter == name:
            return self._cuts.get(name, ())
        if parameter not in self._cuts:
            return ()
        same_shape = self._source.info(name).shape == self._source.info(parameter).shape
        return self._cuts[parameter] if same_shape else ()

    def _check_names(self) -> None:
        for name in sorted({*self._cuts, *self._new} - self._names):
            raise UserError(f"the checkpoint lacks {name}, which the plan prunes")
        kernels = [name for name in self._cuts if name.endswith("_conv1d.weight")]
        biases = {name.removesuffix("weight") + "bias" for name in kernels}
        for bias in sorted(biases & self._names):
            raise UserError(
                f"{bias}: a convolution makes silu(bias) of a channel of zeros, so that removing "
                "one changes the model: only convolutions without bias can be pruned"
            )
        for name, cuts in self._cuts.items():
            shape = self._source.info(name).shape
            if any(cut.dim >= len(shape) or shape[cut.dim] != cut.size for cut in cuts):
                raise UserError(f"{name} has shape {shape}, which config.json does not lead to")


def parameter_of(name: str) -> str:
    """The parameter that an entry of a step belongs to; other names are returned as they are."""
    if not name.startswith(OPTIMIZER_STATE):
        return name
    return name.removeprefix(OPTIMIZER_STATE).rpartition(".")[0]


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
        plan_folder: where the plan's replaced tensors lie, if it has any.

    Raises:
        UserError: a tensor is missing, not finite or damaged, or the disk is too small.
    """
    source = _source(reference, form)
    if plan.projected:
        plan, plan_folder = with_saved_tensors(plan, folder / PROJECTED_FILE), folder
    replaced = _copy_replaced(plan, plan_folder, folder)
    sliced = SlicedSource(source, cuts_of(plan, reference.config), replaced)
    check_space(destination, total_bytes(sliced))
    copy_companions(reference, folder)
    config = complete_config(plan.config_after)
    (folder / PLAN_FILE).write_text(plan_text(plan))
    read = _explained(source, sliced.read)
    if form == "dcp" and has_training_state(reference):
        _write_training_state(config, reference, sliced, read, folder)
    else:
        write = write_hf if form == "hf" else write_run
        infos = {name: sliced.info(name) for name in sliced.names()}
        write(folder, config, infos, read)
    _check_files(source)
    if form == "dcp":
        copy_recipe(reference, folder, destination)


def has_training_state(reference: ModelReference) -> bool:
    """Whether the reference is a step of a run that trains the model itself."""
    return reference.step_folder is not None and not reference.is_lora


def check_model(plan: Plan, reference: ModelReference, name: str = "the plan") -> None:
    """Raise UserError unless `plan` was made from this very model, as far as samples of it tell."""
    if has_training_state(reference):
        source: TensorSource = _step_source(reference, False, "never")
    else:
        source = reference.source()
    mark = fingerprint(reference.config, source)
    if mark != plan.fingerprint:
        _check_files(source)
    check_fingerprint(plan, mark, name)


def _source(reference: ModelReference, form: Form) -> TensorSource:
    """The tensors to transform, those of the optimizer among them where they are to be kept.

    Files of a step are hashed while they are read: `write_pruned` asks for the outcome at its end.
    """
    if not has_training_state(reference):
        return reference.source()
    return _step_source(reference, form == "dcp", "along")


def _step_source(reference: ModelReference, everything: bool, check: Check) -> DcpSource:
    assert reference.step_folder is not None
    return DcpSource(reference.step_folder, everything, check)


def _check_files(source: TensorSource) -> None:
    """Raise UserError if a file of a step is damaged; safetensors have no recorded hashes."""
    if isinstance(source, DcpSource):
        source.finish()


def _explained(source: TensorSource, read: Read) -> Read:
    """`read`, whose complaints give way to that of a damaged file, which would explain them."""

    def explained(name: str) -> Tensor:
        try:
            return read(name)
        except UserError:
            _check_files(source)
            raise

    return explained


def _write_training_state(
    config: Config, reference: ModelReference, sliced: SlicedSource, read: Read, folder: Path
) -> None:
    """Write a step with the number, the schedules and the loader's state of the reference's."""
    step = reference.step_folder
    assert step is not None
    order = _step_source(reference, True, "never").stored_order()
    state: dict[str, Any] = {name: sliced.info(name).promise() for name in order}
    state |= _values(reference)
    number = int(step.name.removeprefix("step-"))
    checkpoints = folder / CHECKPOINT_FOLDER
    save_step(state, checkpoints, number, _extra_files(step), read=read, alone=True)
    write_object(folder / CONFIG_FILE, config, sort_keys=True)


def _values(reference: ModelReference) -> dict[str, Any]:
    """The entries of a step that are no tensors; its files are hashed later, with the tensors."""
    source = _step_source(reference, True, "never")
    try:
        return source.values()
    except UserError:
        _check_files(source)
        raise


def _extra_files(step: Path) -> dict[str, bytes]:
    """The small files of a step that are not DCP's: the loader's state."""
    hashes = read_checksums(step)
    names = [name for name in hashes if name != METADATA and not name.endswith(".distcp")]
    for name in names:
        check_file(step, name, hashes)
    return {name: (step / name).read_bytes() for name in names}


def _copy_replaced(plan: Plan, plan_folder: Path | None, folder: Path) -> Any:
    """A handle of the plan's replaced tensors, copied beside the plan's copy; None without any."""
    if plan.replaced is None:
        return None
    name = plan.replaced.file
    path = (plan_folder or folder) / name
    if not path.is_file():
        raise UserError(f"the plan replaces tensors by those of {path}, which is missing")
    if hash_file(path) != plan.replaced.hash:
        raise UserError(f"{path} is not the file that the plan was made with (its hash differs)")
    if path != folder / name:
        shutil.copyfile(path, folder / name)
    return open_safetensors(path)
