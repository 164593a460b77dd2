"""The data of lm-eval's tasks: local files found, and missing data named in one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flame.data.hub import hub_problem
from flame.errors import UserError, first_line

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Loaders of local files, as a task file names them in `dataset_path`."""


@contextmanager
def data_named(task: str, folder: Path | None) -> Iterator[None]:
    """Within the block, missing data of `task` raises a `UserError` that says what to do.

    Args:
        task: the name that messages give.
        folder: where relative file names are looked for, after the current folder.
    """
    import datasets

    plain = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if path in LOCAL_FORMATS and "data_files" in options:
            options["data_files"] = _located(task, options["data_files"], folder)
        elif not Path(path).exists():
            _check_hub(task, path, name)
        try:
            return plain(path, name, **options)
        except (OSError, ValueError) as error:
            reason = f"task {task} cannot load {path!r}: {first_line(error)}"
            raise UserError(f"{reason}; {WAY_OUT}") from error

    datasets.load_dataset = load
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"task {task} cannot be used: {first_line(error)}") from error
    finally:
        datasets.load_dataset = plain


WAY_OUT = (
    "to use a file of your own, give --task-path DIR with a task file whose dataset_path is json "
    "and whose dataset_kwargs.data_files names it"
)


def _located(task: str, files: Any, folder: Path | None) -> Any:
    """`files` with every relative name resolved to a file here, or else in `folder`.

    `files` is a name, or lists and mappings of names, and the result has the same form with
    absolute paths. URLs and patterns with `*` stay as they are. `task` is for the message only.

    Raises:
        UserError: a file is in neither place.
    """
    if isinstance(files, Mapping):
        return {split: _located(task, part, folder) for split, part in files.items()}
    if isinstance(files, list | tuple):
        return [_located(task, part, folder) for part in files]
    if "://" in str(files) or "*" in str(files):
        return files
    places = [Path(files).expanduser(), *([] if folder is None else [folder / files])]
    for place in places:
        if place.is_file():
            return str(place.absolute())
    looked = " or ".join(dict.fromkeys(str(place) for place in places))
    raise UserError(
        f"task {task} needs the file {looked}, which is not there: put it there, or name another "
        "in the task file's dataset_kwargs.data_files"
    )


def _check_hub(task: str, path: str, name: str | None) -> None:
    """Raise UserError at once if the hub cannot be reached; its own clients retry for long."""
    problem = hub_problem()
    if problem is not None and "HF_HUB_OFFLINE" not in problem:
        part = f" ({name})" if name else ""
        raise UserError(
            f"task {task} needs the data set {path}{part}, and {problem}: {WAY_OUT}; "
            "HF_HUB_OFFLINE=1 uses what an earlier run has fetched"
        )
