"""Small training jobs for the tests, and what they leave."""

import json
from pathlib import Path
from typing import Any

import torch

TINY = {
    "model_type": "gated_deltanet",
    "architectures": ["GatedDeltaNetForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "expand_v": 1.5,
    "vocab_size": 300,
    "hidden_ratio": 2,
    "max_position_embeddings": 256,
}


def write_assets(folder: Path) -> Path:
    """A folder with a model config, a tokenizer and a text file to train on."""
    from flame.data.tokenizer import train_tokenizer

    lines = [f"def f{i}(x):\n    return x * {i} + {i * i % 7}\n" * (1 + i % 5) for i in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    train_tokenizer(lines, 300, folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def make_job(assets: Path, out: Path, **overrides: Any) -> Any:
    """A job of 6 steps of 8 sequences of 64 tokens; `section__key=value` overrides."""
    from flame.config import job_from_tables

    tables: dict[str, Any] = {
        "job": {"dump_folder": str(out)},
        "model": {"config": str(assets / "config.json")},
        "data": {
            "dataset": str(assets / "text.jsonl"),
            "tokenizer": str(assets / "tokenizer"),
            "virtual_shards": 4,
        },
        "training": {"seq_len": 64, "local_batch_size": 2, "global_batch_size": 8, "steps": 6},
        "optimizer": {"lr": 3e-3},
        "lr_scheduler": {"warmup_steps": 2, "total_steps": 6, "decay_type": "cosine"},
        "checkpoint": {"interval": 3, "keep_latest_k": 0},
        "metrics": {"log_freq": 1},
        "debug": {"seed": 1},
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        tables.setdefault(section, {})[name] = value
    return job_from_tables(tables)


def train_job(assets: Path, out: Path, **overrides: Any) -> None:
    from flame.train import train

    train(make_job(assets, out, **overrides))


def tensors_of(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a step, optimizer state included."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from flame.storage.load_step import load_step
    from flame.storage.safe_reader import SafeReader

    entries = SafeReader(step).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_step(state, step, alone=True)
    return state


def largest_difference(one: Path, other: Path) -> float:
    """Largest absolute difference between two steps' tensors, in units of the largest entry."""
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    return max(
        float((first[n] - second[n]).abs().max() / first[n].abs().max().clamp_min(1e-12))
        for n in first
    )


def losses_of(run: Path) -> list[float]:
    losses = scalars_of(run, "loss_metrics/global_avg_loss")
    return [losses[step] for step in sorted(losses)]


def scalars_of(run: Path, tag: str) -> dict[int, float]:
    """A curve of TensorBoard by step, over all attempts of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[int, float] = {}
    for folder in sorted((run / "tb").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        values |= {event.step: event.value for event in events.Scalars(tag)}
    return values
