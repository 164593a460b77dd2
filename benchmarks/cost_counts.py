"""Counting what each phase of a real small job sends and reads, on this rank."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.counting import Collectives, reads_of

CONFIG: dict[str, Any] = {
    "model_type": "gated_deltanet",
    "architectures": ["GatedDeltaNetForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_heads": 2,
    "head_dim": 32,
    "expand_v": 1.0,
    "vocab_size": 384,
    "hidden_ratio": 2,
}
Counts = dict[str, tuple[Counter[str], Counter[str]]]
"""By phase, calls and bytes of each kind of collective; kind `read` has the bytes of files."""


def sizes_of(step: Path) -> dict[str, int]:
    """Bytes of a step's files, of its parts, and its numbers of entries and of weights.

    `common` are the entries that are no tensors, and scalars, which all ranks read; `form` is what
    is stored beside the numbers of tensors: names, shapes, directories, padding.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from flame.checkpoint.dcp_source import TRAINING_PREFIXES
    from flame.storage.safe_reader import SafeReader

    index = SafeReader(step).read_metadata()
    entries = index.state_dict_metadata
    lengths: Counter[str] = Counter()
    for key, place in index.storage_data.items():
        lengths[key.fqn] += place.length
    own = [
        name
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and len(entry.size)
    ]
    tensors = [entry for entry in entries.values() if isinstance(entry, TensorStorageMetadata)]
    numbers = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors)
    return {
        "step": sum(file.stat().st_size for file in step.iterdir() if file.name[0] != "c"),
        "form": sum(lengths.values()) - numbers,
        "weights": sum(lengths[name] for name in own if not name.startswith(TRAINING_PREFIXES)),
        "index": (step / ".metadata").stat().st_size,
        "common": sum(lengths[name] for name in entries.keys() - set(own)),
        "entries": len(entries),
        "tensors": sum(not name.startswith(TRAINING_PREFIXES) for name in own),
    }


def write_assets(folder: Path) -> None:
    """Write a config, a text and its tokenizer, for `count`."""
    from flame.data.corpus import stdlib_texts
    from flame.data.tokenizer import train_tokenizer

    texts = stdlib_texts("train")[:200]
    # More documents than ranks of the largest world.
    parts = [text[first : first + 500] for text in texts for first in range(0, len(text), 500)]
    lines = (json.dumps({"text": part}) + "\n" for part in parts[:2048])
    (folder / "text.jsonl").write_text("".join(lines))
    train_tokenizer(texts, CONFIG["vocab_size"], folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(CONFIG))


def count(folder: Path, is_real: bool = True) -> tuple[Counts, dict[str, int]]:
    """Train, save, resume, start from the run and calibrate it; count each on this rank.

    Args:
        folder: where `write_assets` wrote; runs are written beside.
        is_real: whether the other ranks are there, and what they save.

    Returns:
        The counts, and `sizes_of` the step that was saved.
    """
    import flame.register  # noqa: F401
    from flame.training.trainer import Trainer

    ranks = dist.get_world_size()
    job, counts = _job(folder, ranks), Counts()
    with Collectives() as seen:
        trainer: Any = Trainer(job)
    counts["fresh start"] = seen.counted()
    # The first step makes the optimizer's moments, and is logged.
    _train(trainer, 1)
    counts["step"] = _difference(_train(trainer, 3), _train(trainer, 1))
    sizes = _count_files(job, trainer, counts) if is_real else {}
    trainer.close()
    return counts, sizes


def _train(trainer: Any, steps: int) -> Counts:
    """What so many steps cost, with what the loop does once."""
    from flame.process.stop_signals import StopSignals

    save, trainer.checkpointer.save = trainer.checkpointer.save, lambda *_, **__: None
    trainer._shorten_timeouts = lambda: None
    trainer.job_config.training.steps = trainer.step + steps
    try:
        return _counted(lambda: trainer._steps(StopSignals(), []))
    finally:
        trainer.checkpointer.save = save


def _difference(more: Any, fewer: Any) -> Any:
    """One step's cost, from those of three steps and of one."""
    return tuple(
        +Counter({kind: (many[kind] - few[kind]) // 2 for kind in many})
        for many, few in zip(more, fewer, strict=True)
    )


def _count_files(job: Any, trainer: Any, counts: Counts) -> dict[str, int]:
    from flame.checkpoint.load import load_weights
    from flame.process.peers import on_first
    from flame.run_folder.prepare import prepare_run_folder
    from flame.run_folder.start_model import start_model
    from flame.training.start_checks import check_start

    counts["save"] = _counted(lambda: trainer.checkpointer.save(trainer.step, last_step=True))
    run = Path(job.job.dump_folder)
    step = run / "checkpoint" / f"step-{trainer.step}"
    on_first(lambda: prepare_run_folder(job, trainer.dataloader.documents))

    def resume() -> None:
        check_start(job)
        trainer.checkpointer.load()

    counts["resume"] = _counted(resume, step)
    new = dataclasses.replace(
        job,
        job=dataclasses.replace(job.job, dump_folder=str(run / "new")),
        model=dataclasses.replace(job.model, init=str(run)),
    )

    def init() -> None:
        check_start(new)
        load_weights(trainer.model_parts[0], start_model(new).source())

    # As a job of its own, which trusts nothing.
    _forget()
    counts["init"] = _counted(init, step)
    _forget()
    counts["calibration"] = _counted(lambda: _calibrate(run), step)
    counts["apply"] = _counted(_apply(run), step)
    return sizes_of(step)


def _calibrate(run: Path) -> None:
    from flame.checkpoint.reference import resolve
    from pruning.calibrate import calibrate
    from pruning.calibration.data import calibration_data
    from pruning.options import DataOptions
    from pruning.statistics import QueryKeyGram

    reference = resolve(run)
    # Two rounds, whatever the number of ranks.
    options = DataOptions(sequences=2 * dist.get_world_size(), seq_len=32)
    calibrate(reference, (QueryKeyGram,), calibration_data(reference, options))


def _apply(run: Path) -> Callable[[], None]:
    """Plan, and return what applies the plan."""
    from pruning import apply, plan

    words = [str(run), str(run / "plan.json")]
    plan.run(plan.STAGE.parse([*words, "--method", "l1", "--ratio", "0.5"]))
    return lambda: apply.run(apply.STAGE.parse([*words, f"{run}-pruned"]))


def _counted(work: Callable[[], object], step: Path | None = None) -> Any:
    with Collectives() as seen, reads_of(step or Path("/")) as read:
        work()
    if step is not None:
        seen.bytes["read"] = sum(read.values())
    return seen.counted()


def _forget() -> None:
    from flame.storage import compared

    compared._compared.clear()


def _job(folder: Path, ranks: int) -> Any:
    from flame.config import job_from_tables

    return job_from_tables(
        {
            "job": {"dump_folder": str(folder / f"run-{ranks}")},
            "model": {"config": str(folder / "config.json")},
            "data": {
                "dataset": str(folder / "text.jsonl"),
                "tokenizer": str(folder / "tokenizer"),
                "virtual_shards": ranks,
            },
            "training": {
                "seq_len": 32,
                "local_batch_size": 1,
                "global_batch_size": 2 * ranks,
                "steps": 99,
            },
            "lr_scheduler": {"warmup_steps": 1, "total_steps": 99},
            "checkpoint": {"interval": 100},
            "metrics": {"log_freq": 100},
        }
    )
