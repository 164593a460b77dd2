"""Sections of a recipe that say how a job runs: processes, checkpoints, logs, timeouts."""

from dataclasses import dataclass
from typing import Literal

from flame.options import option

MOST = 2**62
"""Bound of whole numbers that nothing else bounds."""


@dataclass
class Parallelism:
    data_parallel_replicate_degree: int = option(
        1, "copies of the model (HSDP); 1 for FSDP2 alone", least=1, most=2**20
    )
    data_parallel_shard_degree: int = option(
        -1, "processes that share a copy of the model; -1 for all that are left", least=-1,
        most=2**20,
    )  # fmt: skip
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = option(
        "default",
        "`never` keeps a block's weights gathered from the forward to the backward pass: faster, "
        "more memory",
    )
    reduce_gradients: Literal["each_micro_batch", "once_a_step"] = option(
        "each_micro_batch",
        "when gradients are summed over the processes; `once_a_step` sends them once however many "
        "micro-batches a step has, but each process holds them in full until then "
        "(`--estimate` counts it)",
    )


@dataclass
class Checkpoint:
    interval: int = option(
        500, "steps between checkpoints; the last step is always saved", least=1, most=MOST
    )
    keep_latest_k: int = option(
        2,
        "whole checkpoints to keep; 0 keeps all. An old one is deleted when the new one is whole",
        least=0,
        most=MOST,
    )
    load_step: int = option(-1, "step to go on from; -1 for the latest", least=-1, most=MOST)
    fallback: bool = option(
        False, "if the newest step is damaged, go on from the whole step before it"
    )
    async_mode: Literal["disabled", "async"] = option(
        "disabled", "`async` saves while training goes on"
    )
    enable_first_step_checkpoint: bool = option(False, "save step 1 too")


@dataclass
class ActivationCheckpoint:
    mode: Literal["none", "full", "selective"] = option(
        "none", "layers recomputed in the backward pass: `full` every one, `selective` every n-th"
    )
    selective_ac_option: str = option("2", "n of `selective`, as text")


@dataclass
class Compile:
    enable: bool = option(
        False,
        "compile each layer with `torch.compile`, on a GPU; no gain with fla, whose kernels stay "
        "out of graphs: one block falls into 28",
    )
    backend: Literal["inductor", "aot_eager", "cudagraphs", "eager"] = option(
        "inductor", "backend of `torch.compile`"
    )


@dataclass
class Metrics:
    log_freq: int = option(10, "steps between lines of the log", least=1, most=MOST)
    enable_tensorboard: bool = option(True, "write TensorBoard events into `save_tb_folder`")
    save_tb_folder: str = option("tb", "folder of TensorBoard events, inside the run folder")
    save_for_all_ranks: bool = option(False, "write events of each rank, not of rank 0 alone")
    disable_color_printing: bool = option(True, "lines of the log without colours")
    enable_wandb: bool = option(False, "log to Weights & Biases, if `wandb` is installed")


@dataclass
class Profiling:
    enable_profiling: bool = option(False, "write traces of PyTorch's profiler")
    save_traces_folder: str = option("profile_traces", "their folder, inside the run folder")
    profile_freq: int = option(10, "steps of one cycle of the profiler", least=1, most=MOST)
    profiler_warmup: int = option(
        3, "steps of a cycle that warm up before the traced ones", least=0, most=MOST
    )
    profiler_active: int = option(1, "steps of a cycle that are traced", least=1, most=MOST)
    enable_memory_snapshot: bool = option(False, "write snapshots of a GPU's memory")
    save_memory_snapshot_folder: str = option(
        "memory_snapshot", "their folder, inside the run folder"
    )


@dataclass
class Comm:
    init_timeout_seconds: int = option(
        600, "seconds that a rank waits for another until the first step is done", least=1,
        most=10**9,
    )  # fmt: skip
    train_timeout_seconds: int = option(
        600,
        "seconds that a rank waits for another, in a step or while a checkpoint is written, once "
        "the first step is done; then the job ends, naming the rank that hangs",
        least=1,
        most=10**9,
    )
    trace_buf_size: int = option(
        0,
        "collectives that NCCL's flight recorder remembers and writes out when one times out; 0 "
        "switches it off",
        least=0,
        most=2**31 - 1,
    )
    save_traces_folder: str = option(
        "comm_traces", "folder of the flight recorder's files, inside the run folder"
    )
    save_traces_file_prefix: str = option("rank_", "beginning of their names")


@dataclass
class Debug:
    seed: int | None = option(
        None, "seed of weights, adapters and dropout; none is 0", least=0, most=MOST
    )
    deterministic: bool = option(False, "use deterministic operators where there are any; slower")
    deterministic_warn_only: bool = option(
        False, "with `deterministic`, warn of an operator that has no such form"
    )
