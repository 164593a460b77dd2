"""Checking the weights that a training job starts from, before it writes anything.

The ranks share the reading; an error that one of them finds is raised on all.
"""

import logging
from pathlib import Path
from typing import Any

from flame.checkpoint.dcp_source import DcpSource
from flame.checkpoint.fingerprint import finite_parts
from flame.checkpoint.load import check_weights
from flame.checkpoint.reference import ModelReference, resolve
from flame.checkpoint.source import TensorSource
from flame.checkpoint.steps import (
    is_whole,
    latest_whole_step,
    set_aside,
    step_folder,
    whole_steps,
)
from flame.checkpoint.verify import verify_model, verify_together
from flame.errors import UserError
from flame.model import meta_model
from flame.process.distributed import rank, world_size
from flame.process.peers import Peers
from flame.run_folder.start_model import start_model

log = logging.getLogger(__name__)


def check_start(job: Any) -> None:
    """Check the step to resume, `model.init` and `distill.teacher`. Collective.

    Raises:
        UserError: on every rank, naming a file or tensor that is damaged, not finite or of another
            model.
    """
    peers = Peers()
    step = _undamaged_step(job, peers)
    if step is not None:
        _check_finite(peers, peers.agree(lambda: DcpSource(step)))
        peers.agree(lambda: _check_entries(step) if rank() == 0 else None)
    if job.model.init and (step is None or job.lora.rank > 0):
        _check_model(peers, peers.agree(lambda: start_model(job)))
    if job.distill.teacher:
        _check_model(peers, peers.agree(lambda: resolve(job.distill.teacher)))


def _undamaged_step(job: Any, peers: Peers) -> Path | None:
    """Return the step that the job resumes, its hashes checked; None if it has none.

    With `checkpoint.fallback` a damaged step is set aside and the one before it is tried.
    """
    while True:
        step = peers.from_first(peers.agree(lambda: _resumed_step(job) if rank() == 0 else None))
        if step is None:
            return None
        try:
            verify_together(step)
            return step
        except UserError as error:
            before = peers.from_first(_whole_step_before(step) if rank() == 0 else None)
            _give_up_step(job, step, before, str(error), peers)


def _give_up_step(job: Any, step: Path, before: str | None, error: str, peers: Peers) -> None:
    """Set a damaged step aside if the job may fall back to `before`; else raise `error`."""
    if before is None or job.checkpoint.load_step != -1:
        raise UserError(error)
    if not job.checkpoint.fallback:
        raise UserError(f"{error}; or pass --fallback to go on from {before}")
    aside = step.with_name(step.name.replace("step-", "damaged-"))
    if rank() == 0:
        log.warning("slimstate: warning: %s", f"{error}; going on from {before}, see {aside.name}")
    peers.agree(lambda: set_aside(step, aside) if rank() == 0 else None)


def _whole_step_before(step: Path) -> str | None:
    number = int(step.name.removeprefix("step-"))
    earlier = [other for other in whole_steps(step.parent) if other < number]
    return f"step-{earlier[-1]}" if earlier else None


def _resumed_step(job: Any) -> Path | None:
    """Return the step that the job resumes, `checkpoint.load_step` or the latest, if any."""
    folder, asked = Path(job.job.dump_folder) / job.checkpoint.folder, job.checkpoint.load_step
    if asked == -1:
        latest = latest_whole_step(folder)
        return None if latest is None else step_folder(folder, latest)
    step = step_folder(folder, asked)
    if not is_whole(step):
        raise UserError(f"checkpoint.load_step is {asked}, but {step} is no whole step")
    latest = latest_whole_step(folder) or asked
    if latest > asked:
        # New steps would be older than `latest`: they would be purged, and `latest` resumed.
        raise UserError(
            f"checkpoint.load_step is {asked}, and step-{latest} lies after it: move that away, or "
            "leave load_step out to go on from there"
        )
    return step


def _check_entries(step: Path) -> None:
    """Read the entries that are no tensors; the reader refuses all but plain data."""
    DcpSource(step, everything=True).values()


def _check_model(peers: Peers, reference: ModelReference) -> None:
    """Check a model whose weights are loaded later. Collective."""
    verify_model(reference)

    def opened() -> TensorSource:
        source = reference.source()
        check_weights(meta_model(reference.config), source)
        return source

    _check_finite(peers, peers.agree(opened))


def _check_finite(peers: Peers, source: TensorSource) -> None:
    peers.go_through(finite_parts(source, rank(), world_size()))
