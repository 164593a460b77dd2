"""Whether vLLM's server gives a model's tokens and log-probabilities, and keeps what we count.

    python -m benchmarks.serve_vllm MODEL… [--environment vllm-cpu] [--refused MODEL…]

MODEL is a Hugging Face folder with a tokenizer, as `slimstate convert --to hf` writes it. Each is
served by vLLM on a CPU, in bf16, and continues prompts greedily that are sent alone, together, and
cut into chunks by `--max-num-batched-tokens`. transformers computes the same in float32 and bf16.
A token of the engine's is as good as transformers' if it is the same, or if transformers' own bf16
rounding exceeds half of what lies between the two. A REFUSED model is one that `slimstate
serve-check` refuses; the engine gets it as well, to show what it does.
"""

import argparse
import inspect
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flame.register  # noqa: F401
from benchmarks.vllm_cpu import CACHE_GIB, Server, environment, serving
from flame.checkpoint.reference import read_config
from flame.errors import UserError, run_stage
from launch.drawing.table import Column, Table
from launch.serving.capacity import Capacity
from launch.serving.capacity import Server as Memory
from launch.serving.footprint import footprint
from pruning.serving.verdict import verdicts

CHUNK = 128
"""Tokens of all prompts together that the engine takes in one step."""
CONTEXT = 512
NEW_TOKENS = 16
BLOCK = 128
"""vLLM's blocks on a CPU are multiples of so many tokens."""

KINDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "single": ((40,), (100,)),
    "batched": ((17, 33, 48, 64, 80, 90),),
    "chunked": ((300,), (450, 20, 200)),
}
"""Lengths of the prompts of each request."""

WORDS = ("--max-model-len", str(CONTEXT), "--max-num-batched-tokens", str(CHUNK))

COLUMNS = (
    Column("model", "model", align="left"),
    Column("kind", "prompts", align="left"),
    Column("prompts", "n", "d"),
    Column("same", "same tokens", align="left"),
    Column("gap", "largest gap of others", ".4f"),
    Column("error", "log-prob. error, vLLM", ".4f"),
    Column("rounding", "transformers in bf16", ".4f"),
    Column("mean_error", "mean, vLLM", ".5f"),
    Column("mean_rounding", "transformers in bf16", ".5f"),
)

BLOCK_COLUMNS = (
    Column("model", "model", align="left"),
    Column("state", "state and windows of a layer, bytes", ",d"),
    Column("kv", "keys and values of a token, bytes", ",d"),
    Column("block", "tokens of a block, counted", ",d"),
    Column("said_block", "said", ",d"),
    Column("padding", "padding, counted", ".4f"),
    Column("said_padding", "said", ".4f"),
    Column("blocks", "blocks, counted", ",d"),
    Column("said_blocks", "said", ",d"),
)


@dataclass(frozen=True)
class Answer:
    """What the engine and transformers say of one prompt's continuation."""

    tokens: list[int]
    """The engine's."""
    logprobs: Tensor
    """The engine's, of its tokens."""
    exact: Tensor
    """Float32 log-probabilities of all tokens of the vocabulary at those places."""
    rounded: Tensor
    """The same in bf16."""

    @property
    def chosen(self) -> Tensor:
        return torch.tensor(self.tokens)[:, None]

    @property
    def errors(self) -> Tensor:
        """The engine's error at each token."""
        return (self.logprobs - self.exact.gather(1, self.chosen)[:, 0]).abs()

    @property
    def rounding(self) -> Tensor:
        """Transformers' own error in bf16 at each token."""
        return (self.rounded - self.exact).gather(1, self.chosen)[:, 0].abs()

    @property
    def gaps(self) -> Tensor:
        """By how much transformers' token is ahead of the engine's, 0 where they are one."""
        return self.exact.max(1).values - self.exact.gather(1, self.chosen)[:, 0]


def main() -> None:
    # Whoever ends this script ends the server too: the contexts are left on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_stage(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--environment", type=Path, default=Path("vllm-cpu"))
    parser.add_argument("--refused", nargs="*", type=Path, default=[])
    given = parser.parse_args()
    python = environment(given.environment)
    rows, blocks = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for model in given.models:
            with serving(python, model, Path(scratch, "log"), WORDS) as server:
                rows += list(compared(model, server))
                blocks.append(counted(model, server))
        print(f"{Table(COLUMNS, rows).markdown()}\n\n{Table(BLOCK_COLUMNS, blocks).markdown()}")
        for model in given.refused:
            print(f"\n{model.name}, by our check: {refusal(model)}")
            print(f"{model.name}, by the engine: {crash(python, model, Path(scratch, 'log'))}")


def compared(model: Path, server: Server) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of prompts."""
    found = answers(model, server)
    for kind, of_kind in found.items():
        errors = torch.cat([each.errors for each in of_kind])
        rounding = torch.cat([each.rounding for each in of_kind])
        gaps = torch.cat([each.gaps for each in of_kind])
        yield {
            "model": model.name,
            "kind": kind,
            "prompts": len(of_kind),
            "same": f"{int((gaps == 0).sum())} of {len(gaps)}",
            "gap": float(gaps.max()),
            "error": float(errors.max()),
            "rounding": float(rounding.max()),
            "mean_error": float(errors.mean()),
            "mean_rounding": float(rounding.mean()),
        }


def answers(model: Path, server: Server) -> dict[str, list[Answer]]:
    """Return the answers to all prompts, by kind."""
    from transformers import AutoModelForCausalLM

    tokens = text_tokens(model)
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    found: dict[str, list[Answer]] = {}
    for kind, requests in KINDS.items():
        for request in requests:
            prompts = [tokens[37 * length : 38 * length] for length in request]
            for prompt, answer in zip(prompts, server.complete(prompts, NEW_TOKENS), strict=True):
                logits = [forced(m, prompt, answer["token_ids"]) for m in (exact, rounded)]
                logprobs = torch.tensor(answer["logprobs"])
                found.setdefault(kind, []).append(Answer(answer["token_ids"], logprobs, *logits))
    return found


def text_tokens(model: Path) -> list[int]:
    """Return the tokens of a long Python source file."""
    from transformers import AutoTokenizer

    text = inspect.getsource(argparse) * 2
    return list(AutoTokenizer.from_pretrained(model)(text)["input_ids"])


def forced(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Return log-probabilities of the vocabulary before each of `tokens`, which follow `prompt`."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    return logits.float().log_softmax(-1)


def counted(model: Path, server: Server) -> dict[str, Any]:
    """Return what `slimstate capacity` counts beside what the engine says of its blocks.

    The engine has one pool of blocks for all layers: one holds the keys and values of `block`
    tokens of a softmax layer, or, padded, the state and windows of a linear layer.
    """
    config = read_config(model / "config.json")
    found = Capacity(footprint(config), Memory(CACHE_GIB * 2**30))
    linear = config["layer_types"].count("linear_attention")
    state = (found.state + found.conv) // linear
    kv = found.kv(1) // (config["num_hidden_layers"] - linear)
    block = -(-state // (kv * BLOCK)) * BLOCK
    said = server.settings()
    return {
        "model": model.name,
        "state": state,
        "kv": kv,
        "block": block,
        "said_block": int(said["block_size"]),
        "padding": block * kv / state - 1,
        "said_padding": server.padding(),
        "blocks": int(said["kv_cache_memory_bytes"]) // (block * kv),
        "said_blocks": int(said["num_gpu_blocks"]),
    }


def refusal(model: Path) -> str:
    """Return why `slimstate serve-check` refuses a model on vLLM's CPU path."""
    (verdict,) = verdicts(read_config(model / "config.json"), ["vllm-cpu"])
    return verdict.refusal or "not refused"


def crash(python: Path, model: Path, log: Path) -> str:
    """Return what the engine does with a model that it cannot serve."""
    try:
        with serving(python, model, log, WORDS) as server:
            try:
                server.complete([text_tokens(model)[:40]], NEW_TOKENS)
            except UserError as error:
                return f"started, and failed at the first prompt ({error})"
    except UserError as error:
        return f"did not start ({error})"
    return "served"


if __name__ == "__main__":
    main()
