"""The tasks of lm-eval and of local task files: found, loaded, and measured on a model."""

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.util
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.errors import UserError, first_line
from flame.options import option
from flame.process.environment import environment
from launch.lm.task_data import data_named

if TYPE_CHECKING:
    from launch.lm.model import SlimstateLM

BOOTSTRAP = 1000
"""Resamplings for the standard errors that have no formula."""

SEEDS = (0, 1234)
"""Of Python, and of NumPy, torch and the choice of examples: lm-eval's own defaults."""


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks, and how much of them."""

    tasks: tuple[str, ...] = option(
        (), "lm-eval's tasks, groups or tags, or those of --task-path", metavar="A,B"
    )
    task_path: Path | None = option(
        None, "folder with task files of your own, which come before lm-eval's", metavar="DIR"
    )
    limit: int | None = option(None, "documents of each task (default: all)", least=1, metavar="N")
    num_fewshot: int | None = option(
        None, "examples before each question (default: the task's)", least=0, metavar="N"
    )

    def record(self) -> dict[str, Any]:
        """What changes a score."""
        from launch.evaluation.results_file import files_mark

        files = (
            [] if self.task_path is None else [f for f in self.task_path.rglob("*") if f.is_file()]
        )
        return {
            "tasks": list(self.tasks),
            "task_files": files_mark(files),
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
        }


def check_tasks(options: TaskOptions) -> None:
    """Refuse tasks that are not there; cheap where all are local ones.

    Raises:
        UserError: lm-eval is not installed, the folder is missing, or a name is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "tasks need lm-eval, which is not installed: pip install 'slimstate[tasks]'"
        )
    if options.task_path is not None and not options.task_path.is_dir():
        raise UserError(f"--task-path {options.task_path} is not a folder")
    known = _manager(options).all_tasks
    for name in options.tasks:
        if name not in known:
            raise UserError(_unknown(name, known))


def load_tasks(options: TaskOptions) -> dict[str, Any]:
    """The tasks with their data, as lm-eval's `evaluate` takes them.

    Raises:
        UserError: as `check_tasks`; or data is missing, or a task file cannot be used.
    """
    check_tasks(options)
    manager = _manager(options)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in options.tasks:
        with _quiet(), data_named(name, options.task_path):
            for kind, found in manager.load([name]).items():
                loaded[kind].update(found)
    for task in loaded["tasks"].values():
        _settle_fewshot(task, options.num_fewshot)
    return loaded


def evaluate_tasks(
    lm: "SlimstateLM", tasks: dict[str, Any], limit: int | None = None
) -> dict[str, Any]:
    """Scores of `lm`, and what they were measured with, for JSON. Collective.

    `results` and `versions` are lm-eval's, `task_hashes` name documents, prompts and targets.
    On ranks above 0 standard errors that take resampling are left out.

    Args:
        tasks: what `load_tasks` gave; may be used again.
        limit: documents of each task; None for all.
    """
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    from flame.process.distributed import rank

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS[1])
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[1])
    # In this process: lm-eval would fork one that has threads and a GPU.
    with _quiet(), environment({"DISABLE_MULTIPROC": "1"}):
        try:
            found = evaluate(
                lm,
                tasks,
                limit=limit,
                bootstrap_iters=BOOTSTRAP if rank() == 0 else 0,
                log_samples=True,
            )
        except ValueError as error:
            raise UserError(f"lm-eval refuses the tasks: {first_line(error)}") from error
    return _record(lm, found)


def headline(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each score of `results` with its standard error, as text, by `task metric`."""
    figures = {}
    for task, scores in results.items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            spread = f" ±{error:.2g}" if isinstance(error, int | float) and error > 0 else ""
            named = metric if kind == "none" else f"{metric} ({kind})"
            number = f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
            figures[f"{task} {named}"] = f"{number}{spread}"
    return figures


def _record(lm: "SlimstateLM", found: Mapping[str, Any]) -> dict[str, Any]:
    from lm_eval.utils import hash_string

    samples = found.get("samples", {})
    marks = ("doc_hash", "prompt_hash", "target_hash")
    return {
        "results": found["results"],
        "groups": dict(found.get("groups", {})),
        "versions": found["versions"],
        "n_shot": found["n-shot"],
        "n_samples": found["n-samples"],
        "higher_is_better": found["higher_is_better"],
        "task_hashes": {
            task: hash_string("".join(sample[mark] for sample in drawn for mark in marks))
            for task, drawn in samples.items()
        },
        "lm_eval": importlib.metadata.version("lm_eval"),
        "seeds": list(SEEDS),
        "bootstrap": BOOTSTRAP,
        **lm.description(),
    }


def _settle_fewshot(task: Any, wanted: int | None) -> None:
    """Set a task's examples to `wanted`; a file's 0 stays, and without either it is 0."""
    own = task.get_config("num_fewshot")
    if own is None or (wanted is not None and own != 0):
        task.set_config(key="num_fewshot", value=wanted or 0)


def _manager(options: TaskOptions) -> Any:
    """The local tasks if they are all that is asked for: reading lm-eval's own takes 10 s."""
    with _quiet():
        if options.task_path is not None:
            local = _indexed(options.task_path.absolute(), False)
            if set(options.tasks) <= set(local.all_tasks):
                return local
        return _indexed(options.task_path and options.task_path.absolute(), True)


@cache
def _indexed(path: Path | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    include = None if path is None else str(path)
    return TaskManager(include_path=include, include_defaults=defaults)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists its own"
    return f"unknown task {name}: {hint} (--task-path DIR adds task files)"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval in the block: its logs below errors, its prints and progress bars."""
    import datasets
    from tqdm import tqdm

    datasets.disable_progress_bars()
    logger, plain = logging.getLogger("lm_eval"), tqdm.__init__
    before = logger.level
    logger.setLevel(logging.ERROR)
    # Bars that say themselves whether they are shown, as this project's do, are left alone.
    tqdm.__init__ = functools.partialmethod(plain, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = plain
        logger.setLevel(before)
