"""Whether all nodes of a job see one run folder: a checkpoint is written by all of them."""

import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from flame.errors import UserError
from flame.process.atomic_output import made_folder
from flame.process.distributed import world_size
from flame.process.peers import Peers

PATIENCE = 10.0
"""Seconds until a file that one node wrote must be seen on another (NFS caches folders)."""


def check_shared(folder: Path) -> None:
    """Refuse nodes that do not see what rank 0 writes into `folder`. Collective.

    Raises:
        UserError: on every rank, naming a node that does not see it.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == world_size():
        return
    peers, new = Peers(), not folder.exists()
    marker = folder / f".seen-by-all-{peers.from_first(uuid.uuid4().hex[:8])}"
    try:
        peers.agree(lambda: _write(marker) if peers.is_first else None)
        peers.agree(lambda: _see(marker))
    finally:
        if peers.is_first:
            marker.unlink(missing_ok=True)
            if new:
                with suppress(OSError):
                    folder.rmdir()


def _write(marker: Path) -> None:
    try:
        with made_folder(marker.parent):
            marker.write_text(socket.gethostname())
    except OSError as error:
        raise UserError(f"cannot write {marker.parent}: {error.strerror}") from error


def _see(marker: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not marker.exists():
        if time.monotonic() > end:
            raise UserError(
                f"node {socket.gethostname()} does not see the run folder that rank 0 writes, "
                f"{marker.parent.absolute()}: put job.dump_folder on a file system of all nodes"
            )
        time.sleep(0.2)
