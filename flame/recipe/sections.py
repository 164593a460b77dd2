"""The sections and keys of a recipe: types, defaults, bounds and a line about each.

Those that say how a job runs, and not what it learns, are in `flame.recipe.running`.

They are the keys of torchtitan that work here and those of this project; `flame.config` refuses a
change of any other key of torchtitan. docs/recipe.md is made from them. The module imports neither
torch nor torchtitan.
"""

from dataclasses import dataclass, field
from typing import Literal

from flame.data.config import DataConfig
from flame.options import option
from flame.recipe.running import (
    MOST,
    ActivationCheckpoint,
    Checkpoint,
    Comm,
    Compile,
    Debug,
    Metrics,
    Parallelism,
    Profiling,
)


@dataclass
class Job:
    dump_folder: str = option("./outputs", "the run folder; what is in it goes on")
    description: str = option("default job", "a line for the log")


@dataclass
class Model:
    config: str = option("", "architecture: a `config.json`, a folder that has one, or a hub name")
    init: str = option(
        "",
        "model whose weights training starts from, at step 0: a run, step, Hugging Face folder or "
        "hub name",
    )


@dataclass
class Training:
    steps: int = option(10000, "steps to train", least=1, most=MOST)
    seq_len: int = option(2048, "tokens in a sequence", least=1, most=2**24)
    global_batch_size: int = option(
        -1, "sequences in a step, on all processes together; must be set", least=-1, most=2**20
    )
    local_batch_size: int = option(
        8,
        "most sequences that a process takes at a time; fewer if they do not divide its share",
        least=1,
        most=2**20,
    )
    max_norm: float = option(1.0, "norm that gradients are clipped to", above=0)
    max_nonfinite_steps: int = option(
        10,
        "stop after this many steps in a row whose loss or gradient norm is not finite; such a "
        "step changes no weight, the schedule and the data go on. It is seen when the next step is "
        "under way, of which nothing is kept then",
        least=1,
        most=MOST,
    )
    mixed_precision_param: Literal["bfloat16", "float32"] = option(
        "bfloat16", "dtype to compute in on a GPU; weights stay in float32"
    )
    gc_freq: int = option(50, "steps between garbage collections of Python", least=1, most=MOST)


@dataclass
class Validation:
    enable: bool = option(False, "measure the loss on held-out text while training")
    freq: int = option(100, "steps between measurements", least=1, most=MOST)
    steps: int = option(
        10,
        "batches of `training.global_batch_size` sequences that are measured, the same each time; "
        "-1 for all of the held-out text",
        least=-1,
        most=MOST,
    )


@dataclass
class Optimizer:
    name: Literal["AdamW", "Adam"] = option("AdamW", "optimizer")
    lr: float = option(8e-4, "highest learning rate", above=0)
    beta1: float = option(0.9, "decay of the mean of the gradients", least=0, below=1)
    beta2: float = option(0.95, "decay of the mean of their squares", least=0, below=1)
    eps: float = option(1e-8, "added to the root of the mean square", least=0)
    weight_decay: float = option(0.1, "weight decay, of all parameters but those exempt", least=0)
    implementation: Literal["for-loop", "foreach", "fused"] = option(
        "fused",
        "how the update is computed; all give the same to rounding. With the others than `fused` "
        "the host waits in each step for the GPU to say whether the step is finite",
    )


@dataclass
class LRScheduler:
    warmup_steps: int = option(200, "steps in which the rate rises from 0", least=0, most=MOST)
    total_steps: int | None = option(
        None,
        "steps of the whole schedule, for a run that stops before its end; none for "
        "`training.steps`",
        least=1,
        most=MOST,
    )
    decay_ratio: float | None = option(
        None,
        "share of the steps in which the rate decays at the end, after a stable phase (WSD); none "
        "to decay from the warm-up on",
        least=0,
        most=1,
    )
    decay_type: Literal["linear", "sqrt", "cosine"] = option("linear", "curve of the decay")
    min_lr_factor: float = option(
        0.0, "lowest rate of the decay, as a part of `optimizer.lr`", least=0, most=1
    )


@dataclass
class Lora:
    rank: int = option(
        0, "rank of low-rank adapters (peft); 0 trains all parameters", least=0, most=2**20
    )
    alpha: float = option(64.0, "scale: the update is `alpha / rank * B @ A`", above=0)
    rslora: bool = option(
        False, "scale by `alpha / sqrt(rank)` instead (rank-stabilised, arXiv 2312.03732)"
    )
    dropout: float = option(
        0.0,
        "dropout before the down-projection; its draws depend on seed, step and rank",
        least=0,
        below=1,
    )
    dora: bool = option(
        False, "train magnitude and direction apart (DoRA, arXiv 2402.09353), a length for each row"
    )
    bias: Literal["none", "all", "lora_only"] = option(
        "none", "biases trained beside the adapters, as in peft; `lora_only` are the targets'"
    )
    target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj"],
        "linear modules that get an adapter, by the last part of their name",
    )
    train_also: list[str] = option(
        ["conv1d", "norm", "bias"],
        "parameters trained in full beside the adapters: those whose name contains one of these",
    )
    init: str = option(
        "",
        "adapters to start from, a peft folder or a LoRA run; they keep their own scale (alpha, "
        "`rslora`, what is set for single modules); empty for random A and zero B",
    )
    merge: bool = option(
        True, "at the end, write the merged model as a run folder `merged/` inside the run"
    )


@dataclass
class Trainable:
    modules: list[str] = option(
        [],
        "train only parameters whose name contains one of these; empty for all. Not with LoRA",
    )


@dataclass
class Distill:
    """The loss `ce_weight · CE + weight · T² · KL(teacher ‖ student) + hidden_weight · hidden`."""

    teacher: str = option(
        "", "model to learn from: a run, step, Hugging Face folder or hub name; empty for none"
    )
    temperature: float = option(
        2.0, "T, by which both models' logits are divided before the softmax", above=0
    )
    weight: float = option(1.0, "weight of T² · KL(teacher ‖ student)", least=0)
    ce_weight: float = option(
        1.0, "weight of the cross entropy with the text; always 1 without a teacher", least=0
    )
    hidden_weight: float = option(
        0.0, "weight of the distance between the layers' outputs and the teacher's", least=0
    )
    chunk_tokens: int = option(
        0,
        "tokens whose logits are in memory together; 0 chooses by vocabulary and device",
        least=0,
        most=MOST,
    )


@dataclass
class Recipe:
    """All sections."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    data: DataConfig = field(default_factory=DataConfig)
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    lora: Lora = field(default_factory=Lora)
    trainable: Trainable = field(default_factory=Trainable)
    distill: Distill = field(default_factory=Distill)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    comm: Comm = field(default_factory=Comm)
    debug: Debug = field(default_factory=Debug)
    profiling: Profiling = field(default_factory=Profiling)
