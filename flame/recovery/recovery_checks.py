"""What can be wrong with `[lora]`, `[trainable]` and `[distill]`, checked without weights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from flame.checkpoint.reference import resolve
from flame.checkpoint.steps import whole_steps
from flame.errors import UserError
from flame.hugging_face.config_file import vocabulary_size
from flame.recovery.adapter_scaling import check_recorded, check_start
from flame.recovery.lora import check_adapters, check_targets, inject
from flame.recovery.trainable import check_modules, suggestion

BIASES = ("none", "all", "lora_only")


def check_recovery(job: Any, model: nn.Module, config: dict[str, Any]) -> None:
    """Raise UserError for the first option of `[lora]`, `[trainable]` or `[distill]` that is wrong.

    Args:
        job: a `flame.config.JobConfig`.
        model: the student on the meta device.
        config: its `config.json`.
    """
    if job.lora.rank > 0:
        _check_lora(job, model)
    elif job.lora.dora or job.lora.init:
        name = "dora" if job.lora.dora else "init"
        raise UserError(f"lora.{name} is set and lora.rank is 0: give a rank, 32 for one")
    check_modules(model, job.trainable.modules)
    _check_distill(job, config)


def _check_lora(job: Any, model: nn.Module) -> None:
    lora = job.lora
    if job.trainable.modules:
        raise UserError(
            "trainable.modules and lora.rank are both set: name what is trained beside the "
            "adapters in lora.train_also"
        )
    if not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise UserError(f"lora.alpha is {lora.alpha}: it must be above 0")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"lora.dropout is {lora.dropout}: it must be at least 0 and below 1")
    if lora.bias not in BIASES:
        raise UserError(f"lora.bias is {lora.bias!r}: choose from {', '.join(BIASES)}")
    if not lora.target_modules:
        raise UserError("lora.target_modules is empty: name a module, or set lora.rank to 0")
    check_targets(model, lora.target_modules)
    check_trained_too(model, lora)
    if lora.init:
        start = resolve(lora.init)
        if not start.is_lora:
            raise UserError(f"lora.init {lora.init} holds no adapters: give it as --init")
        check_start(lora)
        inject(model, lora)
        check_adapters(model, start.own_source())
    run = Path(job.job.dump_folder)
    if whole_steps(run / job.checkpoint.folder):
        check_recorded(lora, run)


def check_trained_too(model: nn.Module, lora: Any) -> None:
    """Raise UserError for an entry of `lora.train_also`, but its defaults, that names nothing."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for entry in set(lora.train_also) - set(type(lora)().train_also):
        if not entry or not any(entry in name for name in names):
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise UserError(
                f"lora.train_also names {entry!r}, which is in no parameter's name: "
                f"{suggestion(entry, parts)}"
            )


def _check_distill(job: Any, config: Mapping[str, Any]) -> None:
    """Check numbers, teacher and vocabularies; `config` is the student's."""
    distill = job.distill
    if distill.chunk_tokens < 0:
        raise UserError(f"distill.chunk_tokens is {distill.chunk_tokens}: give 0 or more")
    if not distill.teacher:
        return _check_without_teacher(distill)
    _check_distill_numbers(distill)
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


def _check_distill_numbers(distill: Any) -> None:
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
