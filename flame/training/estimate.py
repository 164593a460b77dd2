"""Estimating a training job's GPU memory from shapes, without a GPU, weights or data.

Parameters, gradients, moments and the teacher's weights are counted exactly: FSDP2 cuts every
parameter along its first dimension into one piece per shard, and the first rank's is the longest.
Gathered weights, logits and activations, which exist during part of a step, are estimated. For
activations that is two numbers for each output of a linear layer and four for each number in a
block's input; fused kernels need less and plain ones more.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flame.model import count_parameters, full_precision_parameters, layers, meta_model
from flame.training.losses.chunk_rows import chunk_rows
from flame.training.micro_batch import with_micro_batch
from flame.training.step.gradients import ONCE

FLOAT = 4
"""Bytes of an fp32 number, the dtype of weights, gradients and moments."""

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
PLAN_ENTRY, RESULT_ENTRY = 190, 127
"""Bytes that a rank's plan and the results of its writing have of each entry, as DCP sends them to
the first rank (counted by `benchmarks.cost_model`)."""
ENTRIES = 16
"""Entries of a step for each parameter: itself, its moments and the optimizer's options."""

LOGIT_COPIES = 3
"""Tensors of the size of a chunk's logits that exist at once; a teacher adds as many."""

PER_OUTPUT, PER_INPUT = 2, 4
"""Numbers kept for the backward per linear output, and per number in a block's input."""


@dataclass(frozen=True)
class Part:
    """One line of the table."""

    name: str
    bytes: int
    counted: bool
    """Whether `bytes` is exact and not an estimate."""


def estimate(job: Any, world_size: int) -> list[Part]:
    """Return the parts of the first rank's GPU memory when `job` trains on `world_size` GPUs."""
    job = with_micro_batch(job, world_size)
    model = _built(job)
    shards = world_size // job.parallelism.data_parallel_replicate_degree
    compute = DTYPE_BYTES[job.training.mixed_precision_param]
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        Part("parameters", FLOAT * shard_numel(model, model.parameters(), shards), True),
        Part("gradients", FLOAT * shard_numel(model, trained, shards), True),
        *_unreduced(job, model, trained, world_size),
        Part("optimizer", moment_bytes(model, trained, shards), True),
        *_teacher(job, shards, compute),
        Part("gathered weights", compute * gathered_numel(model), False),
        Part("logits of a chunk", _logits(job, model), False),
        Part("activations", compute * _activations(job, model), False),
    ]


def estimate_table(job: Any, nproc: int, nnodes: int) -> str:
    """Return the estimate for `nnodes` × `nproc` GPUs as text, with its mesh and batch named."""
    world_size = nproc * nnodes
    training = with_micro_batch(job, world_size).training
    replicas = job.parallelism.data_parallel_replicate_degree
    parts = estimate(job, world_size)
    total = sum(part.bytes for part in parts)
    how = {True: "counted", False: "estimated"}
    lines = [f"{part.name:<20}{_gib(part.bytes)}  {how[part.counted]}" for part in parts]
    return "\n".join(
        [
            f"Memory of one GPU of {world_size} ({nnodes} x {nproc}), {replicas} x "
            f"{world_size // replicas} replicas x shards, {training.local_batch_size} sequences of "
            f"{training.seq_len} tokens at a time, {training.mixed_precision_param}",
            "",
            f"{'part':<20}{'GiB':>9}",
            *lines,
            f"{'total':<20}{_gib(total)}  without the allocator's own and CUDA's context",
            "",
            _rank_zero(job, world_size),
        ]
    )


def _rank_zero(job: Any, world_size: int) -> str:
    """Return the line about what the first rank holds besides, in its host's memory."""
    model = _built(job)
    drawn = FLOAT * count_parameters(model.parameters()) / 2**30
    fresh = "" if job.model.init else f"{drawn:,.1f} GiB while it draws fresh weights, "
    saved = [p for p in model.parameters() if p.requires_grad or job.lora.rank == 0]
    plans = world_size * (PLAN_ENTRY + RESULT_ENTRY) * ENTRIES * len(saved)
    return (
        f"rank 0 besides, in the host's memory: {fresh}at most {plans / 2**20:,.0f} MiB of plans "
        "while a step is saved"
    )


def _built(job: Any) -> nn.Module:
    """Return the model that is trained, with adapters if it has any, on the meta device."""
    import flame.register  # noqa: F401
    from flame.training.train_spec import CausalLMArgs, build_model

    arguments = CausalLMArgs()
    arguments.update_from_config(job)
    return build_model(arguments)


def shard_numel(model: nn.Module, parameters: Iterable[Tensor], shards: int) -> int:
    """Count the numbers that the first rank holds of `parameters`, which belong to `model`."""
    whole = {id(p) for p in full_precision_parameters(model).values()}
    return sum(
        p.numel() if id(p) in whole else math.ceil(p.shape[0] / shards) * (p.numel() // p.shape[0])
        for p in parameters
    )


def moment_bytes(model: nn.Module, trained: list[nn.Parameter], shards: int) -> int:
    """Return the bytes of AdamW's two fp32 moments and its step count for each parameter."""
    return FLOAT * (2 * shard_numel(model, trained, shards) + len(trained))


def gathered_numel(model: nn.Module) -> int:
    """Count the weights gathered at once: the root group and the two largest blocks."""
    blocks = sorted((count_parameters(block.parameters()) for block in layers(model)), reverse=True)
    return count_parameters(model.parameters()) - sum(blocks) + sum(blocks[:2])


def _unreduced(
    job: Any, model: nn.Module, trained: list[nn.Parameter], world_size: int
) -> list[Part]:
    """The gradients in full that wait for the last micro-batch, if there are several."""
    training = job.training
    several = training.global_batch_size > training.local_batch_size * world_size
    if job.parallelism.reduce_gradients != ONCE or not several:
        return []
    whole = {id(p) for p in full_precision_parameters(model).values()}
    sharded = [p for p in trained if id(p) not in whole]
    return [Part("unreduced gradients", FLOAT * count_parameters(sharded), True)]


def _teacher(job: Any, shards: int, compute: int) -> list[Part]:
    from flame.checkpoint.reference import resolve

    if not job.distill.teacher:
        return []
    model = meta_model(resolve(job.distill.teacher).config)
    held = FLOAT * shard_numel(model, model.parameters(), shards)
    return [
        Part("teacher", held, True),
        Part("teacher, gathered", compute * gathered_numel(model), False),
    ]


def _logits(job: Any, model: nn.Module) -> int:
    """Return the bytes of a chunk's logits, as fp32, and of the projection's fp32 gradient."""
    weight = model.get_output_embeddings().weight  # type: ignore[operator]
    vocabulary, width = weight.shape
    tokens = job.training.local_batch_size * job.training.seq_len
    trained = weight.requires_grad
    chunk = job.distill.chunk_tokens or chunk_rows(vocabulary, trained, "cuda")
    copies = LOGIT_COPIES * (2 if job.distill.teacher else 1)
    return FLOAT * (copies * min(chunk, tokens) * vocabulary + trained * vocabulary * width)


def _activations(job: Any, model: nn.Module) -> int:
    """Count the numbers that one micro-batch keeps for its backward pass."""
    tokens, width = job.training.local_batch_size * job.training.seq_len, model.config.hidden_size
    every = {"none": 0, "full": 1}.get(job.activation_checkpoint.mode)
    if every is None:
        every = int(job.activation_checkpoint.selective_ac_option)
    kept = [_kept(block, width) for block in layers(model)]
    recomputed = {n for n in range(len(kept)) if every and n % every == 0}
    alive = sum(width if n in recomputed else own for n, own in enumerate(kept))
    return tokens * (alive + max((kept[n] for n in recomputed), default=0))


def _kept(block: nn.Module, width: int) -> int:
    """Count the numbers per token that a block keeps for its backward pass."""
    outputs = sum(m.out_features for m in block.modules() if isinstance(m, nn.Linear))
    return PER_OUTPUT * outputs + PER_INPUT * width


def _gib(size: int) -> str:
    return f"{size / 2**30:9.3f}"
