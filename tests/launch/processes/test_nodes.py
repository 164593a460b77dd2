"""Several nodes on this machine: two launchers of two processes, one lost, and the SLURM script."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import free_port, run_distributed
from tests.flame.jobs import (
    TINY,
    largest_difference,
    losses_of,
    make_job,
    train_job,
    write_assets,
)

ROOT = Path(__file__).parents[3]
WAIT = 900.0
"""Seconds; a job takes a tenth of it on a machine that does nothing else."""

PRUNE = ["--method", "drrqr", "--ratio", "0.5", "--sequences", "8", "--seq-len", "64"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the other tests', with 32 key channels, half of which is a width that is allowed."""
    import json

    folder = write_assets(tmp_path_factory.mktemp("assets"))
    (folder / "config.json").write_text(json.dumps(TINY | {"head_dim": 32, "expand_v": 0.75}))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_nodes_do_what_one_does(assets: Path, tmp_path: Path) -> None:
    """Pretrain under torchrun, prune and recover by our launcher, 2 x 2 processes against 4."""
    from pruning import prune

    dense, pruned, recovered = (tmp_path / name for name in ("dense", "pruned", "recovered"))
    recovery = {"model__init": str(pruned), "lora__rank": 4, "training__steps": 3}
    _on_nodes(_torchrun, "flame.train", _recipe(assets, dense))
    _on_nodes(_slimstate, "prune", [str(dense), str(pruned), *PRUNE])
    _on_nodes(_slimstate, "train", _recipe(assets, recovered, **recovery))

    one = tmp_path / "one"
    run_distributed(train_job, 4, assets, one / "dense")
    run_distributed(
        prune.run, 4, prune.STAGE.parse([str(one / "dense"), str(one / "pruned"), *PRUNE])
    )
    recovery["model__init"] = str(one / "pruned")
    run_distributed(train_job, 4, assets, one / "recovered", **recovery)
    assert losses_of(dense) == losses_of(one / "dense")
    assert losses_of(recovered) == losses_of(one / "recovered")
    for step in ("dense/checkpoint/step-6", "pruned/checkpoint/step-6"):
        assert largest_difference(tmp_path / step, one / step) == 0.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_lost_node_does_not_end_an_elastic_job(assets: Path, tmp_path: Path) -> None:
    """The other node goes on alone from the last whole step, over the same tokens."""
    options: dict[str, Any] = {
        "training__steps": 60, "lr_scheduler__total_steps": 60, "checkpoint__interval": 5,
    }  # fmt: skip
    run_distributed(train_job, 1, assets, tmp_path / "whole", **options)
    run, port = tmp_path / "run", free_port()
    recipe = _recipe(assets, run, **options)
    elastic = ["--nnodes", "1:2", "--nproc", "1", "--max-restarts", "3"]
    nodes = [_start(_slimstate("train", [*elastic, *recipe], port)) for _ in range(2)]
    try:
        # A step that two processes wrote: both nodes are in.
        _wait_until(lambda: any(run.glob("checkpoint/step-*/__1_*")))
        host = next(node for node in nodes if _listens(node.pid, port))
        (guest,) = [node for node in nodes if node is not host]
        guest.kill()
        out, err = host.communicate(timeout=WAIT)
        assert (host.returncode, err) == (0, ""), err
    finally:
        for node in nodes:
            node.kill()
    final = "checkpoint/step-60"
    assert not any((run / final).glob("__1_*"))
    assert losses_of(run)[-1] == pytest.approx(losses_of(tmp_path / "whole")[-1], rel=1e-3)
    loaders = [
        (folder / final / "dataloader.json").read_text() for folder in (run, tmp_path / "whole")
    ]
    assert loaders[0] == loaders[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stopped_process_is_named_within_the_timeout(assets: Path, tmp_path: Path) -> None:
    options = {
        "training__steps": 4000, "lr_scheduler__total_steps": 4000, "checkpoint__interval": 5,
        "comm__train_timeout_seconds": 5,
    }  # fmt: skip
    recipe = _recipe(assets, tmp_path / "run", **options)
    words = [sys.executable, "-m", "launch.cli", "train", "--nproc", "2", *recipe]
    node = _start(words)
    try:
        _wait_until(lambda: any(tmp_path.glob("run/checkpoint/step-5")))
        (worker,) = [pid for pid in children_of(node.pid) if environment_of(pid).get("RANK") == "1"]
        os.kill(worker, signal.SIGSTOP)
        out, err = node.communicate(timeout=600)
    finally:
        node.kill()
    assert node.returncode == 1
    assert err.startswith("slimstate: error: rank 1 hangs: no answer in step "), err
    assert err.count("\n") == 1


# The SLURM script ------------------------------------------------------------------------------

STUBS = {
    "srun": 'echo "srun $*"; exit "${STUB_STATUS:-0}"',
    "scontrol": 'if [[ $1 == show ]]; then printf "node7\\nnode9\\n"; else echo "scontrol $*"; fi',
}


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (143, 0)])
def test_slurm_script_starts_each_node_and_queues_again(
    tmp_path: Path, status: int, expected: int
) -> None:
    for name, body in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[7,9]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "48",
        "STUB_STATUS": str(status),
    }
    words = ["bash", str(ROOT / "launch/slurm.sbatch"), "--config", "a b.toml"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "srun --kill-on-bad-exit=1 --cpus-per-task 48 .venv/bin/slimstate train "
        "--nproc 4 --nnodes 2 --rdzv-endpoint node7:23456 --rdzv-id 123456 --config a b.toml"
    )
    assert lines[1:] == (["scontrol requeue 123456"] if status == 143 else [])
    assert (done.returncode, done.stderr) == (expected, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_slurm_script_is_clean() -> None:
    subprocess.run(["shellcheck", str(ROOT / "launch/slurm.sbatch")], check=True)


# Processes -------------------------------------------------------------------------------------


def _recipe(assets: Path, run: Path, **options: Any) -> list[str]:
    from flame.recipe import recipe_text

    recipe = run.with_suffix(".toml")
    recipe.write_text(recipe_text(make_job(assets, run, **options)))
    return ["--config", str(recipe)]


def _torchrun(module: str, arguments: list[str], port: int) -> list[str]:
    meeting = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    place = ["--rdzv-endpoint", f"127.0.0.1:{port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, *meeting, *place, "-m", module, *arguments]


def _slimstate(command: str, arguments: list[str], port: int) -> list[str]:
    nodes = [] if "--nnodes" in arguments else ["--nnodes", "2", "--nproc", "2"]
    meeting = [*nodes, "--rdzv-endpoint", f"127.0.0.1:{port}"]
    return [sys.executable, "-m", "launch.cli", command, *meeting, *arguments]


def _on_nodes(command: Callable[..., list[str]], name: str, arguments: list[str]) -> None:
    port = free_port()
    nodes = [_start(command(name, arguments, port)) for _ in range(2)]
    outcomes = [(node.communicate(timeout=WAIT)[1], node.returncode) for node in nodes]
    assert [code for _, code in outcomes] == [0, 0], outcomes


def _start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, **pipes)


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def _listens(pid: int, port: int) -> bool:
    """Whether process `pid` has the listening TCP socket of `port`."""
    lines = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    fields = [line.split() for line in lines.splitlines()]
    listening = {f[9] for f in fields if f[3] == "0A" and f[1].endswith(f":{port:04X}")}
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return any(link.removeprefix("socket:[").rstrip("]") in listening for link in links)


def children_of(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
