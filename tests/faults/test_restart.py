"""A killed rank under `--max-restarts`: the job goes on from the last whole step by itself."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.checkpoint.steps import latest_whole_step
from tests.faults.bench import Bench, digests
from tests.faults.fork_server import Job
from tests.faults.tasks import RECIPE
from tests.faults.test_kills import losses
from tests.flame.jobs import make_job, train_job
from tests.launch.processes.test_nodes import ROOT, WAIT, children_of, environment_of

STEPS = 12
OPTIONS: dict[str, Any] = {
    **RECIPE,
    "training__steps": STEPS,
    "lr_scheduler__total_steps": STEPS,
    "checkpoint__interval": 2,
}


def test_processes_started_again_do_not_wait_for_the_dead(bench: Bench, tmp_path: Path) -> None:
    """torchrun keeps its store, and in it the addresses of those who were there before."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start in range(3):
        outcome = bench.server.run(Job(meet, (store.port, start), 2, tmp_path / str(start)))
        assert outcome.statuses == (0, 0), outcome.words


def meet(port: int, start: int) -> None:
    from flame.process.distributed import barrier, process_group

    torchrun = {"USE_AGENT_STORE": True, "RESTART_COUNT": start}
    os.environ.update({f"TORCHELASTIC_{name}": str(value) for name, value in torchrun.items()})
    os.environ.update(MASTER_PORT=str(port), GROUP_WORLD_SIZE="1")
    with process_group(timedelta(seconds=30)):
        barrier()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again(bench: Bench, tmp_path: Path, rank: int) -> None:
    assets, run, whole = bench.inputs / "assets", tmp_path / "run", tmp_path / "whole"
    undisturbed = bench.server.run(Job(train, (assets, whole), 2, tmp_path / "place"))
    assert undisturbed.statuses == (0, 0), undisturbed.words
    job = start(assets, run)
    try:
        while latest_whole_step(run / "checkpoint") is None:
            assert job.poll() is None
            time.sleep(0.01)
        os.kill(worker(job, rank), signal.SIGKILL)
        out, err = job.communicate(timeout=WAIT)
    finally:
        job.kill()
    assert (job.returncode, err) == (0, "")
    assert out.count("training starts at step 1\n") == 1
    assert out.count("training starts at step ") == 2 and "loaded " in out
    assert digests(run / "checkpoint") == digests(whole / "checkpoint")
    assert losses(run) == losses(whole)


def train(assets: Path, run: Path) -> None:
    train_job(assets, run, **OPTIONS)


def start(assets: Path, run: Path) -> subprocess.Popen[str]:
    from flame.recipe import recipe_text

    recipe = run.with_suffix(".toml")
    recipe.write_text(recipe_text(make_job(assets, run, **OPTIONS)))
    command = ["train", "--nproc", "2", "--max-restarts", "1", "--config", str(recipe)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *command],
        cwd=ROOT, env=environment, text=True, **pipes,
    )  # fmt: skip


def worker(job: subprocess.Popen[str], rank: int) -> int:
    ranks = {environment_of(process).get("RANK"): process for process in children_of(job.pid)}
    return ranks[str(rank)]
