"""Every stage from a published folder to an exported one, with the memory and reads of each.

All ranks of a job call `measured`; a model of the same family that is much smaller goes first, so
that what is imported and cached once is not counted.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peak_rss import peak_growth
from flame.checkpoint.source import TensorInfo
from flame.process.distributed import gather_objects
from flame.process.peers import on_first
from flame.stage import Stage

TOKENS = 128
"""Of a calibration sequence."""

LINEAR = {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
DENSE: dict[str, Any] = LINEAR | {
    "model_type": "qwen3_5_text",
    "hidden_size": 256,
    "intermediate_size": 832,
    "num_hidden_layers": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_value_heads": 6,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = LINEAR | {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 128,
    "num_hidden_layers": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
MODELS = {"dense": DENSE, "experts": EXPERTS}
"""As deep and with the tensors of Qwen3.5-27B and Qwen3.5-35B-A3B, and narrow."""


def measured(config: dict[str, Any], folder: Path, text: Path) -> dict[str, tuple[int, int]]:
    """Most bytes that a rank held and read in each stage. Collective over all ranks.

    Args:
        config: the model's.
        folder: to be written into, the same on every rank.
        text: a folder with `text.jsonl` and its `tokenizer`, of at most the model's vocabulary.
    """
    small = {**config, "num_hidden_layers": 4}
    for name, each in (("small", small), ("model", config)):
        on_first(partial(write_folder, folder / name, each))
    for work in stages(folder / "small", text).values():
        work()
    found: dict[str, tuple[int, int]] = {}
    for name, work in stages(folder / "model", text).items():
        with peak_growth() as grown:
            work()
        of_ranks = gather_objects((grown.bytes, grown.read))
        found[name] = (max(b for b, _ in of_ranks), max(r for _, r in of_ranks))
    return found


def stages(model: Path, text: Path) -> dict[str, Callable[[], Any]]:
    """By name, what does each stage on a folder; each reads what those before it wrote."""
    from flame import convert
    from flame.checkpoint.load import build_sharded
    from flame.checkpoint.reference import resolve
    from flame.process.distributed import data_parallel_mesh
    from pruning import apply, calibrate, plan

    def at(name: str) -> str:
        return f"{model}-{name}"

    data = ["--data", str(text / "text.jsonl"), "--tokenizer", str(text / "tokenizer")]
    data += ["--sequences", "4", "--seq-len", str(TOKENS)]
    chosen = ["--method", "output-error", "--ratio", "0.5", "--multiple-of", "8"]
    sums = ["--repair", "output", "--repair-stats", at("sums")]
    lines: dict[str, tuple[Stage, list[str]]] = {
        "calibrate": (
            calibrate.STAGE,
            [str(model), at("stats"), *data, "--methods", "output-error,drrqr"],
        ),
        "plan, by weights": (
            plan.STAGE, [str(model), at("l1.json"), "--method", "l1", *chosen[2:]],
        ),
        "plan, by statistics": (
            plan.STAGE, [str(model), at("plan.json"), "--stats", at("stats"), *chosen],
        ),
        "calibrate for the repair": (
            calibrate.STAGE, [str(model), at("sums"), "--plan", at("plan.json"), *data],
        ),
        "plan with the repair": (
            plan.STAGE,
            [str(model), at("repaired.json"), "--stats", at("stats"), *chosen, *sums],
        ),
        "apply": (apply.STAGE, [str(model), at("repaired.json"), at("pruned")]),
        "apply to dcp": (
            apply.STAGE, [str(model), at("repaired.json"), at("run"), "--to", "dcp"],
        ),
        "convert to dcp": (convert.STAGE, [str(model), at("dcp"), "--to", "dcp"]),
        "convert to hf": (convert.STAGE, [at("run"), at("export"), "--to", "hf"]),
    }  # fmt: skip
    found: dict[str, Callable[[], Any]] = {
        "load": lambda: build_sharded(resolve(model), data_parallel_mesh())
    }
    for name, (stage, words) in lines.items():
        found[name] = partial(_run, stage, words)
    return found


def _run(stage: Stage, words: list[str]) -> None:
    stage.run(stage.parse(words))


def write_folder(folder: Path, config: dict[str, Any]) -> None:
    """Write a Hugging Face folder of the model with random numbers in bfloat16."""
    from flame.hugging_face.model_folder import write_hf
    from flame.hugging_face.stock_form import stock_form

    folder.mkdir()
    drawn = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).bfloat16() / 20
    shapes = stock_form(config).shapes

    def read(name: str) -> Tensor:
        size = torch.Size(shapes[name]).numel()
        return drawn.repeat(-(-size // len(drawn)))[:size].view(shapes[name])

    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    write_hf(folder, config, infos, read)


def write_text(folder: Path) -> None:
    """Write a text and its tokenizer."""
    from flame.data.corpus import stdlib_texts
    from flame.data.tokenizer import train_tokenizer

    texts = stdlib_texts("train")[:100]
    folder.mkdir()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train_tokenizer(texts, 512, folder / "tokenizer")
