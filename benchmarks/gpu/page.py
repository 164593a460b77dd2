"""The Markdown page of `benchmarks/gpu.sh`, from its results."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.parts import Part

TITLE = "# What a GPU measured"
REHEARSAL = (
    "A rehearsal on tiny sizes: it shows that the commands run, and no figure means anything."
)


def page(parts: Sequence[Part], results: Mapping[str, Any]) -> str:
    """All parts in order: each command, how it ended, and what it printed.

    Args:
        results: `rehearsal`, and `commands`, by line: `status`, `seconds` and `output`.
    """
    found = results["commands"]
    commands = [command for part in parts for command in part.commands]
    ended = [found[c.line]["status"] for c in commands if c.line in found]
    lines = [
        TITLE,
        "",
        f"`bash benchmarks/gpu.sh OUT` made this page: {len(ended)} of {len(commands)} commands "
        f"ran, {sum(status != 0 for status in ended)} of them failed."
        + (f" {REHEARSAL}" if results["rehearsal"] else ""),
    ]
    for part in parts:
        lines += ["", f"## {part.title}"]
        for command in part.commands:
            lines += ["", f"`{command.line}`", "", *_result(found.get(command.line))]
    return "\n".join(lines) + "\n"


def _result(result: Mapping[str, Any] | None) -> list[str]:
    if result is None:
        return ["not run"]
    output = result["output"].rstrip()
    ended = "" if result["status"] == 0 else f" **Failed: {result['status']}.**"
    return ["```", *output.splitlines(), "```", "", f"{result['seconds']:.0f} s.{ended}"]
