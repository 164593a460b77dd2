"""The teacher of a distillation run: checked before work, built sharded, remembered by its run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.load import build_sharded
from flame.checkpoint.reference import ModelReference, resolve, vocabulary_size
from flame.errors import UserError
from flame.storage.json_file import read_object, write_object
from flame.training.headless import output_head, run_headless

TEACHER_FILE = "teacher.json"
"""In a run folder: reference and fingerprint of the teacher that the run learns from."""


class Teacher:
    """A model that is asked and not trained, sharded by FSDP2 over the student's mesh.

    A rank holds `1 / shards` of its weights; a layer is gathered while it runs, the output
    projection with the input embedding until `release`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)

    @classmethod
    def build(cls, reference: ModelReference, mesh: DeviceMesh, dtype: torch.dtype) -> "Teacher":
        """The model of `reference`, of any kind, computing in `dtype`. Collective over `mesh`."""
        return cls(build_sharded(reference, mesh, dtype))

    @property
    def head(self) -> nn.Module:
        return output_head(self.model)

    @torch.no_grad()
    def states(
        self, inputs: Mapping[str, Any], every_layer: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """States before the output projection `[B, T, D]`, and if asked those of every layer."""
        output = run_headless(self.model, inputs, output_hidden_states=every_layer)
        return output.logits, output.hidden_states[1:] if every_layer else ()

    def release(self) -> None:
        """Give the gathered output projection back: nothing but the shards stays on this rank."""
        if not hasattr(self.model, "reshard"):
            return
        self.model.reshard()
        _forget_forward_order(self.model)


def _forget_forward_order(model: nn.Module) -> None:
    """Empty FSDP2's record of the order of forward passes, which only a backward pass empties.

    Without gradients it would grow by an entry a layer with every batch.
    """
    state = model._get_fsdp_state()  # type: ignore[operator]
    for part in state._state_ctx.all_states:
        for group in part._fsdp_param_groups:
            group._post_forward_indices.clear()
    state._comm_ctx.post_forward_order.clear()


def check_distill(job: Any, config: Mapping[str, Any]) -> None:
    """Refuse numbers that are none, and a teacher that is not there or speaks of other tokens.

    Args:
        config: the student's `config.json`.
    """
    distill = job.distill
    if distill.chunk_tokens < 0:
        raise UserError(f"distill.chunk_tokens is {distill.chunk_tokens}: give 0 or more")
    if not distill.teacher:
        return _check_without_teacher(distill)
    _check_numbers(distill)
    teacher = resolve(distill.teacher)
    if Path(job.job.dump_folder).absolute() == teacher.folder:
        raise UserError(f"distill.teacher {distill.teacher} is the run itself: choose another")
    student, other = vocabulary_size(dict(config)), vocabulary_size(teacher.config)
    if student != other:
        raise UserError(
            f"distill.teacher {distill.teacher} has {other} tokens in its vocabulary, the student "
            f"{student}: both must speak of the same tokens"
        )
    if distill.hidden_weight:
        _check_same_shape(teacher.config, config)


def _check_without_teacher(distill: Any) -> None:
    if distill.ce_weight != 1 or distill.hidden_weight:
        name = "hidden_weight" if distill.hidden_weight else "ce_weight"
        raise UserError(f"distill.{name} is {getattr(distill, name)}, and there is no teacher")


def _check_numbers(distill: Any) -> None:
    if not (math.isfinite(distill.temperature) and distill.temperature > 0):
        raise UserError(f"distill.temperature is {distill.temperature}: it must be above 0")
    weights = {name: getattr(distill, name) for name in ("weight", "ce_weight", "hidden_weight")}
    for name, value in weights.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"distill.{name} is {value}: it must be 0 or above")
    if not any(weights.values()):
        raise UserError("distill's weight, ce_weight and hidden_weight are all 0: nothing to learn")


def _check_same_shape(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    for key in ("hidden_size", "num_hidden_layers"):
        if teacher.get(key) != student.get(key):
            raise UserError(
                f"distill.hidden_weight compares layer with layer: the teacher's {key} is "
                f"{teacher.get(key)}, the student's {student.get(key)}; set it to 0"
            )


def record_teacher(name: str, folder: Path, into: Path) -> None:
    """Note the teacher of the run `folder` in folder `into`; refuse another than it has noted."""
    reference = resolve(name)
    mark = fingerprint(reference.config, reference.source())
    noted = folder / TEACHER_FILE
    if noted.is_file() and (recorded := read_object(noted)).get("fingerprint") != mark:
        raise UserError(
            f"{name} is not the teacher that {folder} learnt from ({recorded.get('reference')}): "
            "give that one, or another job.dump_folder"
        )
    record = {"reference": str(reference.weights), "fingerprint": mark}
    write_object(into / TEACHER_FILE, record)
