"""Every command line in the documents is one that the program understands."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from flame.stage import Stage
from launch.cli import COMMANDS
from launch.processes.topology import split_options

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/concepts.md", "docs/results.md", "docs/many-nodes.md", "docs/serving.md", "docs/from-the-paper.md")  # fmt: skip  # noqa: E501
MODULES = {command.module: name for name, command in COMMANDS.items()}
DATA = "--data HuggingFaceFW/fineweb-edu --subset sample-10BT"


def lines(page: str) -> list[str]:
    """The command lines of a page's code blocks, and of its code in the text and in tables."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    found = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    found += re.findall(r"`((?:slimstate|torchrun) [^`]+)`", re.sub(r"\s*\n\s*", " ", text))
    return [line for line in found if re.match(r"\s*(slimstate|torchrun|\$run) ", line)]


def arguments(line: str) -> tuple[str, list[str]] | None:
    """The command's name and its words; None for another program and for a mere name."""
    words = shlex.split(line.replace(" DATA", f" {DATA}").partition(" #")[0])
    if words[0] in ("torchrun", "$run"):
        module = words[words.index("-m") + 1]
        return (MODULES[module], words[words.index(module) + 1 :]) if module in MODULES else None
    if len(words) < 3 or words[1] == "COMMAND" or "…" in words[:3]:
        return None
    return words[1], words[2:]


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_parse(page: str) -> None:
    parsed = 0
    for line in lines(page):
        found = arguments(line)
        if found is None:
            continue
        name, words = found
        assert name in COMMANDS, line
        stage = import_module(COMMANDS[name].module).STAGE
        assert isinstance(stage, Stage)
        _, _, rest = split_options([word for word in words if word != "…"])
        assert stage.parse(rest) is not None, line
        parsed += 1
    assert parsed >= 1, page
