"""The summary of a demo: one row for each of its models, with times and command lines."""

from pathlib import Path
from typing import Any

from flame.storage.json_file import read_object
from launch.reporting.envelope import enveloped, write_result
from launch.reporting.tables import summary_table

SUMMARY_FILE = "summary.json"
PERPLEXITY_FILE = "perplexity.json"
DECODING_FILE = "decoding.json"
REPORT_FILE = "report.html"
TIMES_FILE = "seconds.json"

MODELS = ("dense", "dense_continued", "pruned", "random", "recovered")
"""Rows of the summary, and the folders of their models."""

CONTENT = (
    "analysis", "bench.json", "export", "fidelity.json", "options.json", "statistics", "tokenizer",
    *MODELS, DECODING_FILE, PERPLEXITY_FILE, REPORT_FILE, SUMMARY_FILE, TIMES_FILE,
)  # fmt: skip
"""What a demo makes in its folder."""

SCORES = ("perplexity", "error", "bits_per_byte", "parameters", "state_bytes")


def write_summary(
    folder: Path, line: str, seconds: dict[str, float], commands: list[str], facts: dict[str, Any]
) -> None:
    """Write the figures of a demo's `folder` to its summary file. Run it on one process.

    Args:
        line: the command line of the demo.
        seconds: wall time of each step.
        commands: command lines of the steps.
        facts: what else to note, such as the seed.
    """
    from flame.process.distributed import world_size

    measured = read_object(folder / PERPLEXITY_FILE)["models"]
    rows = {name: {key: measured[str(folder / name)][key] for key in SCORES} for name in MODELS}
    measures = read_object(folder / DECODING_FILE)["measures"]
    (speed,) = (measure for measure in measures if measure["name"] == "decode")
    for name, row in rows.items():
        row["decode_tokens_per_second"] = speed["values"][name]["median"]
    times = {**seconds, "total": sum(seconds.values())}
    content = {
        **rows,
        "world_size": world_size(),
        "seconds": {name: round(value, 2) for name, value in times.items()},
        "commands": commands,
        **facts,
    }
    write_result(folder / SUMMARY_FILE, enveloped("demo", line, content))


def print_summary(folder: Path) -> None:
    """Print the table of a finished demo, and where its files are."""
    summary = read_object(folder / SUMMARY_FILE)
    print(summary_table({name: summary[name] for name in MODELS}).text())
    print(f"\n{folder / 'report.html'} shows it; {folder / SUMMARY_FILE} has the numbers")
