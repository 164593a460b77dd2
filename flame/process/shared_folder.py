"""Checking that all nodes of a job see one run folder, since all of them write checkpoints."""

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
"""Seconds within which a node must see a file that another one wrote (NFS caches folders)."""


def check_shared(folder: Path) -> None:
    """Check that every node sees a file that rank 0 writes into `folder`. Collective.

    A job on one node writes nothing. A folder made for the check is removed again.

    Raises:
        UserError: on every rank, naming a node that does not see the file.
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
