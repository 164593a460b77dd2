"""The recipe: torchtitan's job configuration plus the sections of this project.

A recipe is TOML with torchtitan's sections and conventions (`--section.key value` overrides). Ours
are `[model]` (replaced), `[data]`, `[lora]`, `[trainable]` and `[distill]`; defaults that lose data
in torchtitan are changed.
"""

import flame.process.titan_cpu  # noqa: F401  (must precede torchtitan)

# isort: split
import contextlib
import dataclasses
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan.config import job_config as titan
from torchtitan.config.manager import ConfigManager

from flame.checkpoint.reference import RECIPE_FILE
from flame.data.config import DataConfig
from flame.errors import UserError
from flame.recipe import option_name, read_tables, recipe_path


@dataclass
class Model(titan.Model):
    name: str = "causal_lm"
    """Train spec: `causal_lm` is any causal language model of transformers or fla."""

    flavor: str = "config"
    """Unused: the shape comes from `model.config`."""

    hf_assets_path: str = "."
    """Unused: see `model.config` and `data.tokenizer`."""

    config: str = ""
    """A `config.json`, a folder that has one, or a hub name: the architecture to train."""

    init: str = ""
    """Start at step 0 from the weights of this model reference (run, step, HF folder, hub name)."""


@dataclass
class Lora:
    rank: int = 0
    """Rank of the low-rank adapters (peft); 0 trains all parameters."""

    alpha: float = 64.0
    """Scale of the adapters: the update is `alpha / rank * B @ A`."""

    dropout: float = 0.0
    """Dropout before the adapters' down-projection; its draws follow from seed, step and rank."""

    dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv 2402.09353): a length per row beside."""

    bias: str = "none"
    """Biases trained beside the adapters, as in peft: `none`, `all` or `lora_only` (of targets)."""

    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj"])
    """Linear modules that get an adapter, by the last part of their name."""

    train_also: list[str] = field(default_factory=lambda: ["conv1d", "norm", "bias"])
    """Parameters trained in full beside the adapters: those whose name contains one of these."""

    init: str = ""
    """Start from these adapters: a peft folder or a LoRA run of one base; empty: A random, B 0."""

    merge: bool = True
    """Write the merged model as a run folder `merged/` in the run at the end of training."""


@dataclass
class Trainable:
    modules: list[str] = field(default_factory=list)
    """Train only the parameters whose name contains one of these; empty: all. For rank 0."""


@dataclass
class Distill:
    """Loss: `ce_weight · CE + weight · T² · KL(teacher ‖ student) + hidden_weight · hidden`."""

    teacher: str = ""
    """Model to learn from: a run, step, Hugging Face folder or hub name; empty for none."""

    temperature: float = 2.0
    """T: both models' logits are divided by it before the softmax."""

    weight: float = 1.0
    """Weight of T² · KL(teacher ‖ student)."""

    ce_weight: float = 1.0
    """Weight of the cross entropy with the text; 1 without a teacher."""

    hidden_weight: float = 0.0
    """Weight of the distance of the layers' outputs from those of the teacher."""

    chunk_tokens: int = 0
    """Tokens whose logits exist together, teacher or not; 0: what makes 2²⁴ logits."""


@dataclass
class Training(titan.Training):
    max_nonfinite_steps: int = 10
    """Steps in a row whose loss or gradient norm is not finite, until the job stops. Such a step
    changes no weight; the schedule and the data go on."""


@dataclass
class Checkpoint(titan.Checkpoint):
    enable: bool = True
    """Save checkpoints; the last step is always saved, optimizer state included."""

    keep_latest_k: int = 2
    """Whole checkpoints to keep; 0 keeps all. 1 is safe: the old goes after the new is whole."""

    fallback: bool = False
    """Where the newest step is damaged, go on from the whole step before; else it is refused."""

    last_save_model_only: bool = False
    """Refused if set: the last step is saved in full."""


@dataclass
class Metrics(titan.Metrics):
    enable_tensorboard: bool = True
    """Write TensorBoard events to `metrics.save_tb_folder`."""

    disable_color_printing: bool = True
    """Plain text log lines."""


@dataclass
class Comm(titan.Comm):
    trace_buf_size: int = 0
    """Entries of the NCCL flight recorder; 0 switches it off."""

    train_timeout_seconds: int = 600
    """How long a rank waits for another after the first step: in a step, or because the other
    writes its part of a checkpoint for so much longer. Then the job ends and names who hangs."""


@dataclass
class ActivationCheckpoint(titan.ActivationCheckpoint):
    mode: str = "none"
    """`none`, `full` (every layer) or `selective` (every `selective_ac_option`-th layer)."""


@dataclass
class JobConfig(titan.JobConfig):
    """torchtitan's job configuration with this project's sections."""

    model: Model = field(default_factory=Model)
    data: DataConfig = field(default_factory=DataConfig)
    training: Training = field(default_factory=Training)
    lora: Lora = field(default_factory=Lora)
    trainable: Trainable = field(default_factory=Trainable)
    distill: Distill = field(default_factory=Distill)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    comm: Comm = field(default_factory=Comm)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)


_ALWAYS_WRITTEN = ("data.", "training.seq_len", "training.steps", "training.local_batch_size")
"""Keys that a resolved recipe names even where they have their default."""


def parse_job(arguments: list[str]) -> JobConfig:
    """The job configuration of `--job.config_file RECIPE --section.key value …`.

    A recipe in a run folder (beside its `checkpoint/`) dumps into that folder, wherever that lies.
    """
    recipe = recipe_path(arguments)
    if recipe is not None:
        _check_recipe(recipe)
    job = _parse_overrides(arguments)
    if recipe is not None and is_run_folder(recipe.parent) and recipe.name == RECIPE_FILE:
        if not _overrides(arguments, "job.dump_folder"):
            job.job.dump_folder = str(recipe.parent)
    return job


def _parse_overrides(arguments: list[str]) -> JobConfig:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return ConfigManager(JobConfig).parse_args(arguments)
    except SystemExit as error:
        raise UserError(_boxed_message(said.getvalue())) from error


def _boxed_message(text: str) -> str:
    """The message in tyro's printed box: what stands between its first two rules."""
    parts = re.split(r"[-─]{8,}", re.sub(r"[│╭╮╰╯]", " ", text))
    return " ".join(parts[min(1, len(parts) - 1)].split()) or "the command line is not understood"


def is_run_folder(folder: Path) -> bool:
    """Whether `folder` has the shape of a run: a `config.json` beside a `checkpoint/`."""
    return (folder / "config.json").is_file() and (folder / "checkpoint").is_dir()


def job_from_tables(tables: dict[str, Any]) -> JobConfig:
    """A job configuration from a recipe's tables; unknown sections and keys are refused."""
    job = JobConfig()
    for section, values in tables.items():
        if not hasattr(job, section):
            raise UserError(f"recipe section [{section}] is unknown: {_known(JobConfig)}")
        _fill(getattr(job, section), section, values)
    return job


def recipe_text(job: Any) -> str:
    """`job` as TOML: what differs from the defaults, with the data and the batch in any case."""
    lines: list[str] = []
    defaults = dataclasses.asdict(type(job)())
    for section, values in dataclasses.asdict(job).items():
        body = _table_lines(section, values, defaults.get(section, {}))
        if body:
            lines += [*body, ""]
    return "\n".join(lines)


def _table_lines(name: str, values: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    own = {k: v for k, v in values.items() if not isinstance(v, dict) and v is not None}
    changed = {
        key: value
        for key, value in own.items()
        if value != defaults.get(key) or f"{name}.{key}".startswith(_ALWAYS_WRITTEN)
    }
    lines = [f"{key} = {_toml_value(value)}" for key, value in changed.items()]
    if lines:
        lines.insert(0, f"[{name}]")
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _table_lines(f"{name}.{key}", value, defaults.get(key, {}))
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    # A JSON string, number or list of them is also TOML.
    return json.dumps(value)


def _fill(section: Any, name: str, values: Any) -> None:
    if not isinstance(values, dict):
        raise UserError(f"recipe key {name} is not a section: write [{name}]")
    for key, value in values.items():
        if not hasattr(section, key):
            raise UserError(f"recipe key {name}.{key} is unknown: {_known(type(section))}")
        current = getattr(section, key)
        if dataclasses.is_dataclass(current):
            _fill(current, f"{name}.{key}", value)
        else:
            setattr(section, key, _checked(value, current, f"{name}.{key}"))


def _checked(value: Any, current: Any, key: str) -> Any:
    """`value`, if it has the type of the default `current`; an unset default takes any type."""
    if current is None or type(value) is type(current):
        return value
    if isinstance(current, float) and type(value) is int:
        return float(value)
    if isinstance(current, int) and not isinstance(current, bool) and key.endswith("max_norm"):
        return value
    raise UserError(f"recipe key {key} is {value!r}: it takes a {type(current).__name__}")


def _known(cls: type) -> str:
    return "choose from " + ", ".join(f.name for f in dataclasses.fields(cls))


def _check_recipe(path: Path) -> None:
    job_from_tables(read_tables(path))


def _overrides(arguments: list[str], key: str) -> bool:
    return any(option_name(argument) == key for argument in arguments)
