"""What a calibration checks of a model before it runs, which the ranks share."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.counting import reads_of
from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.process.peers import Peers
from pruning.calibrate import examined
from tests.distributed import run_distributed
from tests.flame.tiny import GATED_DELTANET, build, stored_tensors, write_run


def _examine(run: Path) -> tuple[str, Counter[str]]:
    reference = resolve(run)
    with reads_of(reference.weights) as counted:
        try:
            return examined(reference, Peers()), counted
        except UserError as error:
            return str(error), counted


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_reading_of_a_model(tmp_path: Path, world_size: int) -> None:
    tensors = stored_tensors(build(GATED_DELTANET))
    state = {**tensors, **{f"optimizer.state.{n}.exp_avg": t for n, t in tensors.items()}}
    run = write_run(tmp_path / "run", GATED_DELTANET, state)
    reference = resolve(run)
    found = run_distributed(_examine, world_size, run)
    mark = fingerprint(reference.config, reference.source())
    assert [said for said, _ in found] == [mark] * world_size
    shard = reference.weights / "__0_0.distcp"
    read = sum(counted[shard.name] for _, counted in found)
    weights = sum(tensor.nbytes for tensor in tensors.values())
    # The file for its hash, the weights for their values, and the fingerprint's samples of them;
    # entries of these small tensors have as many bytes of form again.
    assert read < shard.stat().st_size + 4 * weights
    tensors["model.norm.weight"][3] = float("nan")
    bad = write_run(tmp_path / "bad", GATED_DELTANET, tensors)
    complaints = {said for said, _ in run_distributed(_examine, world_size, bad)}
    assert complaints == {
        "model.norm.weight holds 1 NaN or infinite values: choose a checkpoint from before "
        "training diverged"
    }
