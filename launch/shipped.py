"""Stage `recipes`: list, show and copy the recipes that come with slimstate.

They lie beside this module, in a checkout as in an installed package.
"""

import difflib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from flame.errors import UserError
from flame.options import option
from flame.process.atomic_output import check_file_output
from flame.stage import Stage
from flame.storage.toml_file import read_toml

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Options:
    show: str | None = option(None, "print one of them", metavar="NAME")
    copy: str | None = option(None, "copy one of them and the config that it names", metavar="NAME")
    to: Path = option(Path("."), "folder to copy to", metavar="FOLDER")
    overwrite: bool = option(False, "replace files that are there")


def names() -> list[str]:
    """Return the names of the recipes, such as `delta_net_370M`."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def path_of(name: str) -> Path:
    """Return the file of a recipe, with or without `.toml`; raise UserError for an unknown one."""
    stem = name.removesuffix(".toml")
    if stem not in names():
        near = difflib.get_close_matches(stem, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names())}"
        raise UserError(f"unknown recipe {name}: {hint}")
    return FOLDER / f"{stem}.toml"


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError for an unknown recipe, files that are there, or more than one process."""
    if world_size != 1:
        raise UserError(f"--nproc {world_size}: recipes copies files, run it on 1 process")
    if options.copy is not None:
        for path in _files(options.copy):
            check_file_output(options.to / path.name, options.overwrite)


def answer(options: Options, nproc: int, nnodes: int) -> str | None:
    """Return the list of recipes, or the one to show; None if one is to be copied."""
    if options.show is not None:
        return path_of(options.show).read_text().rstrip()
    if options.copy is not None:
        return None
    width = max(map(len, names()))
    return "\n".join(f"{name:<{width}}  {_summary(path_of(name))}" for name in names())


def run(options: Options) -> None:
    """Copy a recipe and the config that it names."""
    if options.copy is None:
        return
    options.to.mkdir(parents=True, exist_ok=True)
    for path in _files(options.copy):
        shutil.copyfile(path, options.to / path.name)
    recipe = options.to / path_of(options.copy).name
    command = "sweep" if "methods" in read_toml(recipe, "recipe") else "train"
    print(f"{recipe}: slimstate {command} --config {recipe}", flush=True)


def _files(name: str) -> list[Path]:
    recipe = path_of(name)
    tables = read_toml(recipe, "recipe")
    named = [tables.get("model", {}).get("config"), tables.get("recover")]
    return [recipe, *(recipe.parent / each for each in named if each)]


def _summary(path: Path) -> str:
    """Return the first sentence of the comment with which a recipe begins."""
    lines = re.match(r"(#.*\n)*", path.read_text())
    text = " ".join(line.lstrip("# ") for line in (lines[0] if lines else "").splitlines())
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(".:")


STAGE = Stage(
    "recipes",
    "List the recipes that come with slimstate, show one, or copy one to change it.",
    Options,
    run,
    check,
    answer=answer,
)

if __name__ == "__main__":
    STAGE.main()
