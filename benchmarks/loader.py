"""Tokens a second of the training loader in one process, beside its bare tokenizer's.

    python -m benchmarks.loader [--megabytes 8] [--rounds 3] [--seq-len 2048] [--batch 8]

Text is this Python's standard library, cut into short or long documents and written as parquet and
as JSON lines. The bare tokenizer encodes the same documents, already in memory, in lists as long as
the loader's, and drops the ids. Bare and loader take turns; the best round of each counts. CPU time
is that of all threads of the process, so it is steady on a busy machine; the rate is by the clock.
"""

import argparse
import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.drawing.table import Column, Table

SHORT, LONG = 400, 100_000
"""Characters of a short and of a long document."""

COLUMNS = (
    Column("documents", align="left"),
    Column("format", align="left"),
    Column("tokens", "tokens", ","),
    Column("bare_cpu", "bare, µs CPU a token", ".3f"),
    Column("loader_cpu", "loader", ".3f"),
    Column("cpu_ratio", "bare : loader", ".3f"),
    Column("bare_rate", "bare, tokens/s", ",.0f"),
    Column("loader_rate", "loader", ",.0f"),
    Column("rate_ratio", "loader : bare", ".3f"),
)


def main() -> None:
    logging.getLogger("flame").setLevel(logging.WARNING)
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        text = library_text(int(options.megabytes * 2**20))
        tokenizer = trained(text, Path(folder))
        rows = [
            row(name, form, documents(text, size), tokenizer, Path(folder), options)
            for name, size in (("short", SHORT), ("long", LONG))
            for form in ("parquet", "jsonl")
        ]
    print(Table(COLUMNS, rows).text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--megabytes", type=float, default=8.0, help="of text")
    add("--rounds", type=int, default=3)
    add("--seq-len", type=int, default=2048)
    add("--batch", type=int, default=8, help="sequences of a batch")
    return parser.parse_args()


def library_text(size: int) -> str:
    from flame.data.corpus import stdlib_texts

    text = "\n".join(stdlib_texts("train"))
    return (text * (size // len(text) + 1))[:size]


def documents(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def trained(text: str, folder: Path) -> Any:
    from flame.data.tokenizer import train_tokenizer

    return train_tokenizer(documents(text[: 2**20], 10_000), 4096, folder / "tokenizer")


def row(
    name: str,
    form: str,
    texts: list[str],
    tokenizer: Any,
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, object]:
    path = folder / f"{name}.{form}"
    write(path, texts)
    bare, loader = [], []
    for _ in range(options.rounds):
        bare.append(measured(lambda: encoded(texts, tokenizer)))
        loader.append(measured(lambda: loaded(path, tokenizer, options)))
    bare_cpu, bare_rate = best(bare)
    loader_cpu, loader_rate = best(loader)
    return {
        "documents": f"{name}, {len(texts):,}",
        "format": form,
        "tokens": bare[0][0],
        "bare_cpu": 1e6 * bare_cpu,
        "loader_cpu": 1e6 * loader_cpu,
        "cpu_ratio": bare_cpu / loader_cpu,
        "bare_rate": bare_rate,
        "loader_rate": loader_rate,
        "rate_ratio": loader_rate / bare_rate,
    }


def write(path: Path, texts: list[str]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": texts}), path, row_group_size=max(len(texts) // 8, 1))


def measured(action: Callable[[], int]) -> tuple[int, float, float]:
    """Return the tokens that `action` counts, its CPU seconds and its seconds."""
    cpu, begin = time.process_time(), time.perf_counter()
    tokens = action()
    return tokens, time.process_time() - cpu, time.perf_counter() - begin


def best(rounds: list[tuple[int, float, float]]) -> tuple[float, float]:
    """Return the least CPU seconds a token, and the most tokens a second."""
    return min(c / n for n, c, _ in rounds), max(n / s for n, _, s in rounds)


def encoded(texts: list[str], tokenizer: Any) -> int:
    from flame.data.tokenizer import chunks

    fast = tokenizer.backend_tokenizer
    return sum(
        len(found.ids)
        for chunk in chunks(iter(texts))
        for found in fast.encode_batch_fast(chunk, add_special_tokens=False)
    )


def loaded(path: Path, tokenizer: Any, options: argparse.Namespace) -> int:
    """Count the tokens of one pass of the loader over a file."""
    return sum(labels.numel() for _, labels in batches(path, tokenizer, options))


def batches(path: Path, tokenizer: Any, options: argparse.Namespace) -> Iterator[Any]:
    from flame.data.config import DataConfig
    from flame.data.loader import PackedLoader
    from flame.data.sources import build_documents

    config = dataclasses.replace(
        DataConfig(), dataset=str(path), streaming=True, repeat=False, virtual_shards=1
    )
    loader = PackedLoader(
        build_documents(config, "train"), tokenizer, config, options.seq_len, options.batch
    )
    yield from loader
    loader.close()


if __name__ == "__main__":
    main()
