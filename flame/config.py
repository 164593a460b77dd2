"""The sections of a recipe: torchtitan's job configuration with those of this project.

This project replaces `[model]`, adds `[data]`, `[lora]`, `[trainable]` and `[distill]`, and changes
the defaults with which torchtitan could lose data. A command line overrides keys as torchtitan's
does, by `--section.key value`.
"""

import flame.process.titan_cpu  # noqa: F401  (must precede torchtitan)

# isort: split
import contextlib
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchtitan.config import job_config as titan
from torchtitan.config.manager import ConfigManager

from flame.checkpoint.reference import CHECKPOINT_FOLDER, CONFIG_FILE, RECIPE_FILE
from flame.data.config import DataConfig
from flame.errors import UserError
from flame.recipe import fill, known_fields, option_name, read_tables, recipe_path


@dataclass
class Model(titan.Model):
    name: str = "causal_lm"
    """Train spec; `causal_lm` is any causal language model of transformers or fla."""

    flavor: str = "config"
    """Unused, as the shape comes from `model.config`."""

    hf_assets_path: str = "."
    """Unused, as `model.config` and `data.tokenizer` take its place."""

    config: str = ""
    """Architecture to train: a `config.json`, a folder that has one, or a hub name."""

    init: str = ""
    """Model whose weights training starts from, at step 0: a run, step, HF folder or hub name."""


@dataclass
class Lora:
    rank: int = 0
    """Rank of the low-rank adapters (peft); 0 trains all parameters."""

    alpha: float = 64.0
    """Scale of the adapters: the update is `alpha / rank * B @ A`."""

    dropout: float = 0.0
    """Dropout before the adapters' down-projection; its draws depend on seed, step and rank."""

    dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv 2402.09353), with a length for each row."""

    bias: str = "none"
    """Biases trained beside the adapters, as in peft: `none`, `all` or `lora_only` (of targets)."""

    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj"])
    """Linear modules that get an adapter, by the last part of their name."""

    train_also: list[str] = field(default_factory=lambda: ["conv1d", "norm", "bias"])
    """Parameters trained in full beside the adapters: those whose name contains one of these."""

    init: str = ""
    """Adapters to start from: a peft folder or a LoRA run; empty for random A and zero B."""

    merge: bool = True
    """At the end, write the merged model as a run folder `merged/` inside the run."""


@dataclass
class Trainable:
    modules: list[str] = field(default_factory=list)
    """Train only parameters whose name contains one of these; empty for all. Not with LoRA."""


@dataclass
class Distill:
    """The loss `ce_weight · CE + weight · T² · KL(teacher ‖ student) + hidden_weight · hidden`."""

    teacher: str = ""
    """Model to learn from: a run, step, Hugging Face folder or hub name; empty for none."""

    temperature: float = 2.0
    """T, by which both models' logits are divided before the softmax."""

    weight: float = 1.0
    """Weight of T² · KL(teacher ‖ student)."""

    ce_weight: float = 1.0
    """Weight of the cross entropy with the text; always 1 without a teacher."""

    hidden_weight: float = 0.0
    """Weight of the distance between the layers' outputs and the teacher's."""

    chunk_tokens: int = 0
    """Tokens whose logits are in memory together; 0 for as many as have 2²⁴ logits."""


@dataclass
class Training(titan.Training):
    max_nonfinite_steps: int = 10
    """Stop after this many steps in a row whose loss or gradient norm is not finite. Such a step
    changes no weight; the schedule and the data go on."""


@dataclass
class Checkpoint(titan.Checkpoint):
    enable: bool = True
    """Save checkpoints; the last step is always saved, optimizer state included."""

    keep_latest_k: int = 2
    """Whole checkpoints to keep; 0 keeps all. An old one is deleted when the new one is whole."""

    fallback: bool = False
    """If the newest step is damaged, resume from the whole step before it instead of stopping."""

    last_save_model_only: bool = False
    """Refused if set, because the last step is always saved in full."""


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
    """Seconds that a rank waits for another, in a step or while a checkpoint is written, once the
    first step is done. Then the job ends, naming the rank that hangs."""


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


def parse_job(arguments: list[str]) -> JobConfig:
    """Return the job of a command line `--job.config_file RECIPE --section.key value …`.

    A recipe in a run folder (beside its `checkpoint/`) dumps into that folder, wherever it lies.

    Raises:
        UserError: the recipe or an override is wrong.
    """
    recipe = recipe_path(arguments)
    if recipe is not None:
        job_from_tables(read_tables(recipe))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            job = ConfigManager(JobConfig).parse_args(arguments)
    except SystemExit as error:
        raise UserError(_boxed_message(said.getvalue())) from error
    if recipe is not None and recipe.name == RECIPE_FILE and _is_run_folder(recipe.parent):
        if "job.dump_folder" not in map(option_name, arguments):
            job.job.dump_folder = str(recipe.parent)
    return job


def job_from_tables(tables: dict[str, Any]) -> JobConfig:
    """Return the job of a recipe's tables; raise `UserError` for a wrong section, key or type."""
    job = JobConfig()
    for section, values in tables.items():
        if not hasattr(job, section):
            raise UserError(f"recipe section [{section}] is unknown: {known_fields(JobConfig)}")
        fill(getattr(job, section), section, values)
    return job


def _boxed_message(text: str) -> str:
    """Return the message in tyro's printed box, which stands between its first two rules."""
    parts = re.split(r"[-─]{8,}", re.sub(r"[│╭╮╰╯]", " ", text))
    return " ".join(parts[min(1, len(parts) - 1)].split()) or "the command line is not understood"


def _is_run_folder(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINT_FOLDER).is_dir()
