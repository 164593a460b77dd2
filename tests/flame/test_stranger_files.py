"""Damaged tokenizers, recipes and configurations: read, or one line; in bounded time and memory."""

import json
import random
import resource
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from tests.flame.jobs import TINY
from tests.flame.mutations import damaged, damaged_bytes, damaged_text
from tests.flame.text import tiny_tokenizer

SECONDS = 90
"""Most time for one file."""

MEMORY = 2**30
"""Most bytes by which this process may grow over all of them."""


@contextmanager
def bounded() -> Any:
    """Fail if the block takes too long, in time that is not spent in compiled code."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[], Any], name: str) -> str:
    """`read` or `refused`; another exception than the one line is a failure."""
    with bounded():
        try:
            read()
        except UserError as error:
            line = " ".join(str(error).split())
            assert name in line or "recipe" in line, line
            assert len(line) < 1500
            return "refused"
    return "read"


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


NORMALIZERS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000},
    {"type": "Replace", "pattern": {"String": ""}, "content": "b" * 1000},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": ".?"}, "content": "aaaa"},
    {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}] * 12},
    {"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 500},
    {"type": "Prepend", "prepend": "x" * 10**6},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Unknown"},
]  # fmt: skip
MODELS: list[dict[str, Any]] = [
    {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0], ["b", float("nan")]]},
    {"type": "Unigram", "unk_id": 0, "vocab": [], "byte_fallback": True},
    {"type": "WordLevel", "vocab": {"a": 2**32 - 1, "b": 0}, "unk_token": "c"},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "u", "max_input_chars_per_word": 2**63},
    {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
    {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]] * 3, "dropout": 2.0},
    {"type": "BPE", "vocab": {"a": 5, "b": 5}, "merges": ["a b c"]},
]  # fmt: skip
SPLITS = [
    {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
    for p in ("(a+)+$", "(?:a|a)*b", "(", "", "(?=", ".{1000}{1000}", "[[:^ascii:]]*+")
]


def strange_tokenizers(whole: dict[str, Any]) -> list[bytes]:
    """Tokenizers that are well-formed, and not meant well."""
    found = [{**whole, "normalizer": normalizer} for normalizer in NORMALIZERS]
    found += [{**whole, "model": model} for model in MODELS]
    found += [{**whole, "pre_tokenizer": split} for split in SPLITS]
    added = {"id": 10**9, "content": "zz", "special": True}
    found.append({**whole, "added_tokens": [added]})
    found.append({**whole, "added_tokens": [{**added, "id": -1}]})
    found.append({**whole, "padding": {"strategy": {"Fixed": 2**40}}})
    return [json.dumps(one).encode() for one in found]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damaged_tokenizers(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "whole")
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    draw = random.Random(7)
    load_tokenizer(str(tmp_path / "whole"))
    texts = ["a plain text, 12 of 3 — é 🙂", "a" * 500]
    cases = [
        ("tokenizer.json", content)
        for content in strange_tokenizers(json.loads(files["tokenizer.json"]))
    ]
    for _ in range(240):
        name = draw.choices(
            sorted(files), [4 if n == "tokenizer.json" else 1 for n in sorted(files)]
        )
        whole = json.loads(files[name[0]])
        content = (
            damaged(whole, draw) if draw.random() < 0.9 else damaged_bytes(files[name[0]], draw)
        )
        cases.append((name[0], content))
    begin, found = memory(), []
    for number, (name, content) in enumerate(cases):
        folder = tmp_path / f"case-{number}"
        folder.mkdir()
        for other, whole in files.items():
            (folder / other).write_bytes(content if other == name else whole)

        def read(folder: Path = folder) -> None:
            from flame.data.tokenizer import Encoder

            tokenizer = load_tokenizer(str(folder))
            list(Encoder(tokenizer, tokenizer.eos_token_id is not None).stream(iter(texts)))

        try:
            found.append(outcome(read, "tokenizer"))
        except BaseException:
            print(f"case {number}: {name}: {content[:2000]!r}")
            raise
    print(f"{len(cases)} tokenizers: {found.count('read')} read, {found.count('refused')} refused, "
          f"{(memory() - begin) / 2**20:.0f} MiB")  # fmt: skip
    assert found.count("refused") > 60
    assert memory() - begin < MEMORY


RECIPE = """[job]
dump_folder = "runs/x"
[model]
config = "config.json"
[data]
dataset = "python-stdlib"
tokenizer = "tok"
weights = [0.5, 0.5]
virtual_shards = 8
[training]
seq_len = 64
steps = 6
max_norm = 1.0
[optimizer]
lr = 3e-3
[lora]
rank = 4
target_modules = ["q_proj"]
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_damaged_recipes_and_configurations(tmp_path: Path) -> None:
    from flame.checkpoint.reference import read_config, vocabulary_size
    from flame.config import parse_job
    from flame.storage.json_file import read_object_if_any

    draw, begin, found = random.Random(11), memory(), []
    recipe, config = tmp_path / "recipe.toml", tmp_path / "config.json"
    for number in range(300):
        recipe.write_bytes(damaged_text(RECIPE, draw))
        try:
            found.append(outcome(lambda: parse_job(["--job.config_file", str(recipe)]), "recipe"))
        except BaseException:
            print(f"recipe {number}: {recipe.read_bytes()[:2000]!r}")
            raise
    for number in range(200):
        config.write_bytes(damaged(TINY, draw))
        try:
            found.append(outcome(lambda: vocabulary_size(read_config(config)), "config.json"))
            json.dumps(read_object_if_any(config))
        except BaseException:
            print(f"config {number}: {config.read_bytes()[:2000]!r}")
            raise
    print(f"{len(found)} recipes and configurations: {found.count('read')} read, "
          f"{found.count('refused')} refused, {(memory() - begin) / 2**20:.0f} MiB")  # fmt: skip
    assert min(found.count("read"), found.count("refused")) > 50
    assert memory() - begin < MEMORY
