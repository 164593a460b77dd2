"""Loading a step into a state, resharding it as needed."""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful

from flame.process.peers import Peers, raise_cause
from flame.storage.load_planner import SafeLoadPlanner
from flame.storage.safe_reader import SafeReader


def load_step(
    state_dict: dict[str, Any],
    step: Path,
    process_group: dist.ProcessGroup | None = None,
    *,
    alone: bool = False,
    optional: Collection[str] = (),
) -> None:
    """Load a step into `state_dict` in place, resharding as needed. Collective unless `alone`.

    A rank compares the files that it reads with their hashes first, unless all ranks have done so
    together (`flame.checkpoint.verify`). Each makes its own plan, without the others. Entries that
    only the step has are ignored.

    Args:
        state_dict: what to load; the step must hold every entry, in its shape.
        step: the step folder.
        process_group: the ranks that load together; None for all.
        alone: load in this process by itself, even if a process group exists.
        optional: flat names of entries that keep their value if the step lacks them.

    Raises:
        UserError: raised on every rank if any rank finds a part damaged, hostile or missing.
    """
    reader, peers = SafeReader(step), Peers(process_group, alone)
    # DCP would log a traceback and look for per-rank metadata, so the index is read beforehand.
    peers.agree(reader.read_metadata)
    # As dcp.load does, but it would gather all names and plans on every rank or the first.
    values = {
        name: value.state_dict() if isinstance(value, Stateful) else value
        for name, value in sorted(state_dict.items())
    }
    peers.agree(lambda: _load_alone(values, step, reader, SafeLoadPlanner(optional)))
    for name, value in values.items():
        target = state_dict[name]
        if isinstance(target, Stateful):
            target.load_state_dict(value)
        else:
            state_dict[name] = value


def _load_alone(
    state_dict: dict[str, Any], step: Path, reader: SafeReader, planner: SafeLoadPlanner
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(state_dict, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise_cause(error, f"cannot read {step}")
