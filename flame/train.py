"""Stage `train`: pretrain a model, continue it or recover it after pruning, as a recipe says."""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.options import option, overrides
from flame.process.atomic_output import writer_lock
from flame.process.progress import phase
from flame.recipe import read_tables, recipe_path
from flame.recipe.keys import fill
from flame.recipe.sections import Recipe
from flame.recipe.words import overriding
from flame.stage import Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    config: Path | None = option(
        None, "the recipe (or the recipe.toml of a run folder)", metavar="RECIPE.toml"
    )
    init: str | None = option(
        None,
        "start at step 0 from the weights of a run, step or Hugging Face folder",
        metavar="MODEL",
    )
    merge: bool = option(
        False,
        "end a LoRA run by writing it merged, as the run folder merged/ in it (this is the "
        "default; --lora.no-merge leaves it out)",
    )
    fallback: bool = option(False, "where the newest step is damaged, go on from the one before")
    estimate: bool = option(
        False, "print the memory that each GPU of --nnodes x --nproc will need, and stop"
    )
    overrides: tuple[str, ...] = overrides(
        "override a key of the recipe, e.g. --training.steps 200"
    )

    @property
    def arguments(self) -> list[str]:
        """The command line for torchtitan's parser; raises UserError if no recipe is given."""
        words = [] if self.config is None else ["--job.config_file", str(self.config)]
        words += [] if self.init is None else ["--model.init", self.init]
        words += ["--lora.merge"] if self.merge else []
        words += ["--checkpoint.fallback"] if self.fallback else []
        words += self.overrides
        if recipe_path(words) is None:
            raise UserError(
                "train needs a recipe: --config RECIPE.toml (`slimstate recipes` lists some)"
            )
        return words


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError for a recipe, model or data that cannot be trained on `world_size` ranks."""
    from flame.training.job_checks import check_job

    check_job(job_of(options), world_size)


def check_size(options: Options, world_size: int) -> None:
    """Raise UserError if the job cannot go on with `world_size` processes after nodes were lost."""
    from flame.training.job_checks import check_size

    check_size(job_of(options), world_size)


def answer(options: Options, nproc: int, nnodes: int) -> str | None:
    """Return the table of memory per GPU that `--estimate` asks for; None without that option."""
    if not options.estimate:
        return None
    job = job_of(options)
    from flame.training.estimate import estimate_table
    from flame.training.job_checks import check_numbers, check_size

    check_numbers(job)
    check_size(job, nproc * nnodes)
    return estimate_table(job, nproc, nnodes)


def job_of(options: Options) -> Any:
    """Return the `flame.config.JobConfig` of the options; UserError for a mistake in the recipe."""
    # A mistake in the recipe is said before torchtitan is imported, which takes seconds.
    for tables in (read_tables(recipe_path(options.arguments)), overriding(options.arguments)):
        fill(Recipe(), tables)
    from flame.config import parse_job

    return parse_job(options.arguments)


def run(options: Options) -> None:
    """Train as the options say. Collective; starts a process group unless one is running."""
    train(job_of(options))


def train(job: Any) -> None:
    """Train `job` to its last step, resuming its run folder; merge adapters at the end.

    The run folder is written when all is built and loaded, so a job that is refused changes nothing
    in it.
    """
    with phase("importing torchtitan and fla"):
        import flame.register  # noqa: F401
        from flame.process import logs
        from flame.process.distributed import process_group
        from flame.process.environment import environment
        from flame.process.shared_folder import check_shared
        from flame.run_folder.flight_recorder import flight_recorder
        from flame.run_folder.origin import steps_done
        from flame.training.start_checks import check_start

    logs.configure()
    timeout = timedelta(seconds=job.comm.init_timeout_seconds)
    with (
        environment(flight_recorder(job)),
        process_group(timeout),
        _only_writer(Path(job.job.dump_folder)),
    ):
        check_shared(Path(job.job.dump_folder))
        check_start(job)
        if steps_done(job) == job.training.steps:
            said = (job.job.dump_folder, job.training.steps)
            log.info("%s is finished: it has all %d steps; more training.steps train on", *said)
        else:
            _train(job)
    # Nobody waits for rank 0 here: merging a large model outlasts the timeout of a training step.
    if job.lora.rank > 0 and job.lora.merge and int(os.environ.get("RANK", "0")) == 0:
        merge(Path(job.job.dump_folder))


def _train(job: Any) -> None:
    from flame.process.peers import on_first
    from flame.run_folder.prepare import prepare_run_folder
    from flame.training.trainer import Trainer

    with phase("building the model and its optimizer"):
        trainer = Trainer(job)
    try:
        trainer.load()
        on_first(lambda: prepare_run_folder(job, trainer.dataloader.documents))
        trainer.train()
    finally:
        trainer.close()


def merge(run_folder: Path) -> None:
    """Write the merged model of a LoRA run as a run folder `merged/` in it."""
    from flame.checkpoint.convert import convert
    from flame.run_folder.prepare import MERGED

    convert(str(run_folder), run_folder / MERGED, "dcp", overwrite=True, inside_source=True)


def _only_writer(folder: Path) -> Any:
    """Return a context that, on rank 0, locks the run folder against a second job."""
    from contextlib import nullcontext

    if int(os.environ.get("RANK", "0")) > 0:
        return nullcontext()
    return writer_lock(folder)


STAGE = Stage(
    "train",
    "Train a causal language model from a TOML recipe with torchtitan's sections. A run folder "
    "(job.dump_folder) that has checkpoints is resumed.",
    Options,
    run,
    check,
    check_size,
    answer,
    # For the step in hand and its checkpoint.
    stop_seconds=600,
    epilog="SIGTERM, as a scheduler sends it, and Ctrl-C end the job after the step in hand, which "
    "is saved; the exit status is 143 or 130, and the same command goes on. A second Ctrl-C ends "
    "it at once. Plain torchrun kills after 30 s: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to the time "
    "of a step and a save.",
)

if __name__ == "__main__":
    STAGE.main()
