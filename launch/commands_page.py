"""Make the page docs/commands.md: every command with the options that its stage declares.

`python -m launch.commands_page > docs/commands.md` writes it anew.
"""

from collections.abc import Iterable
from importlib import import_module
from itertools import groupby

from flame.options import REQUIRED, Entry, entries
from flame.stage import Stage
from launch.cli import COMMANDS
from launch.processes.topology import LauncherOptions

INTRODUCTION = """# Commands

Made from the options that the stages declare: write it anew with
`python -m launch.commands_page > docs/commands.md`.

`slimstate COMMAND …` checks the command line and starts the processes. Each command is also a
module that torchrun or srun can start with the same arguments, without the launcher's options.
A mistake is one line on stderr, and the exit status is then not zero."""


def page() -> str:
    """Return the whole page, in Markdown."""
    contents = [
        f"- [`{name}`](#slimstate-{name}): {each.summary}" for name, each in COMMANDS.items()
    ]
    launcher = f"## Options of every command\n\n{_tables(entries(LauncherOptions))}"
    sections = [_section(import_module(command.module).STAGE) for command in COMMANDS.values()]
    return "\n\n".join([INTRODUCTION, "\n".join(contents), launcher, *sections]) + "\n"


def _section(stage: Stage) -> str:
    found = list(entries(stage.options))
    needed = [_usage(entry) for entry in found if entry.default is REQUIRED]
    usage = " ".join([stage.program, *needed, "[options]"])
    parts = [
        f"## slimstate {stage.name}",
        stage.description,
        f"```\n{usage}\ntorchrun … -m {stage.module} …\n```",
        _tables(found),
        stage.epilog,
    ]
    return "\n\n".join(filter(None, parts))


def _usage(entry: Entry) -> str:
    if entry.declared.form == "argument":
        return f"{entry.flag} …" if entry.is_list else entry.flag
    value = entry.metavar if entry.declared.bare is None else f"[{entry.metavar}]"
    return f"{entry.flag} {value}".rstrip()


def _tables(found: Iterable[Entry]) -> str:
    """Return a Markdown table for each heading of the help."""
    tables = []
    for title, group in groupby(found, key=lambda entry: entry.title):
        rows = [_row(entry) for entry in group]
        heading = [f"{title[0].upper()}{title[1:]}:\n"] if title else []
        tables.append("\n".join([*heading, "| option | default | what |", "|---|---|---|", *rows]))
    return "\n\n".join(tables)


def _row(entry: Entry) -> str:
    default = "needed" if entry.default is REQUIRED else entry.shown_default
    cells = [f"`{_usage(entry)}`", default, entry.declared.help]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(page(), end="")
