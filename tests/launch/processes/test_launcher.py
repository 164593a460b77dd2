"""The launcher, with workers that misbehave in every way."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flame.errors import UserError
from launch.processes import failures
from launch.processes.launcher import Job
from launch.processes.topology import Topology, split_options
from tests.distributed import free_port
from tests.launch import probe_stage
from tests.launch.probe_stage import start

ROOT = Path(__file__).parents[3]
UNSHARE_REFUSED = 77
NAMELESS = ("unshare", "--uts", "sh", "-c", 'hostname no-such-host && exec "$@"', "sh")
"""Runs a command on a host whose name does not resolve."""


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a probe on two processes, and return what the terminal shows of its failure."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            start(arguments, Topology(nproc=2))
        assert exit_.value.code == 1
        out, err = capfd.readouterr()
        assert out == ""
        return err

    return run


def test_workers_environment(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    start(["environment", str(tmp_path)], Topology(nproc=2))
    ranks = [_environment(tmp_path / f"rank-{rank}") for rank in range(2)]
    for rank, found in enumerate(ranks):
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (
            str(rank),
            str(rank),
            "2",
        )
    cores = len(os.sched_getaffinity(0))
    expected = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // 2)))
    assert {found["OMP_NUM_THREADS"] for found in ranks} == {expected}
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    assert capfd.readouterr() == ("stdout of rank 0\n", "stderr of rank 0\n")
    assert dict(os.environ) == before


def test_one_process_runs_in_place(tmp_path: Path) -> None:
    before = dict(os.environ)
    start(["environment", str(tmp_path)])
    found = _environment(tmp_path / "rank-0")
    assert found["pid"] == str(os.getpid())
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("0", "1", "0")
    assert dict(os.environ) == before


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_job_of_one_node_cannot_be_reached_from_outside(tmp_path: Path, nproc: int) -> None:
    """The launcher, its workers, and all that they have inherited."""
    process = _job(f"Topology(nproc={nproc})", "sockets", tmp_path)
    assert process.communicate(timeout=100)[1] == "" and process.returncode == 0
    found = [line for file in tmp_path.glob("rank-*") for line in file.read_text().splitlines()]
    assert bool(found) == (nproc > 1)
    assert all(line.startswith(("127.0.0.1", "::1")) for line in found), found


@pytest.mark.slow
def test_a_host_whose_name_does_not_resolve_is_no_hindrance(tmp_path: Path) -> None:
    process = _job("Topology(nproc=2)", "meet", tmp_path, nameless=True)
    out = process.communicate(timeout=100)
    if process.returncode == UNSHARE_REFUSED:
        pytest.skip("this machine lets nobody take another name")
    assert (process.returncode, out[1]) == (0, "")
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-0", "rank-1"]


def test_nodes_whose_names_do_not_resolve_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "no-such-host.invalid")
    topology = Topology(nnodes=2, node_rank=0, rdzv_endpoint=f"127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="this node's name no-such-host.invalid does not resolve"):
        topology.check()


def test_mistake_seen_by_all_ranks_is_one_line(fails: Callable[..., str]) -> None:
    assert fails("misuse") == "slimstate: error: every rank sees that the ratio is 2\n"


def test_mistake_seen_by_one_rank_is_one_line(fails: Callable[..., str]) -> None:
    assert fails("misuse_of_one") == "slimstate: error: shard 1 is damaged\n"


def test_bug_shows_the_traceback_of_the_first_rank(fails: Callable[..., str]) -> None:
    err = fails("bug_of_one")
    assert err.startswith("slimstate: rank 1 failed:\nTraceback (most recent call last):\n")
    assert err.endswith("ZeroDivisionError: a bug of rank 1\n")
    assert err.count("Traceback") == 1


def test_bug_of_all_ranks_is_shown_once(fails: Callable[..., str]) -> None:
    assert fails("bug").count("ZeroDivisionError: a bug of rank") == 1


def test_killed_worker_is_named(fails: Callable[..., str]) -> None:
    line = "slimstate: error: rank 1 was ended by SIGKILL: the machine may be out of memory\n"
    assert fails("killed") == line


@pytest.mark.slow
def test_a_stopped_worker_is_not_called_out_of_memory(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3")
    err = fails("stopped")
    assert err.startswith("slimstate: rank 1 failed:\n") and "memory" not in err
    assert err.endswith("error: rank 0 hung or was stopped, and had to be killed\n")


def test_exit_status_comes_with_last_words(fails: Callable[..., str]) -> None:
    assert fails("status") == "words of rank 1\nslimstate: error: rank 1 ended with status 7\n"


def test_checks_run_before_any_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "run", lambda self: pytest.fail("started"))
    with pytest.raises(UserError, match="refused for 2 processes"):
        start(["refuse"], Topology(nproc=2))


def test_restart_after_a_failure(tmp_path: Path) -> None:
    start(["flaky", str(tmp_path)], Topology(nproc=1, max_restarts=1))
    assert (tmp_path / "attempt-0").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("nproc", [1, 2])
def test_signal_ends_the_job(tmp_path: Path, nproc: int, number: signal.Signals) -> None:
    process = _job(f"Topology(nproc={nproc})", "hang", tmp_path)
    pids = _wait_for_workers(tmp_path, nproc)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err == ""
    assert time.monotonic() - began < 10
    _assert_nothing_left(tmp_path, pids)


def test_death_of_the_launcher_ends_the_workers(tmp_path: Path) -> None:
    process = _job("Topology(nproc=2)", "hang", tmp_path)
    pids = _wait_for_workers(tmp_path, 2)
    process.kill()
    process.communicate(timeout=30)
    _wait_until(lambda: not any(map(_alive, pids)))
    _assert_nothing_left(tmp_path, pids, temporary=False)
    assert list((tmp_path / "tmp").iterdir())
    again = _job("Topology(nproc=2)", "environment", tmp_path)
    assert again.communicate(timeout=60) and again.returncode == 0
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("ranks", [(0, 1), (None, None)], ids=["static", "c10d"])
def test_two_nodes_meet(tmp_path: Path, ranks: tuple[int | None, ...]) -> None:
    meeting = f"nnodes=2, rdzv_endpoint='127.0.0.1:{free_port()}'"
    nodes = [_job(f"Topology(node_rank={r}, {meeting})", "environment", tmp_path) for r in ranks]
    outcomes = [(node.communicate(timeout=60)[1], node.returncode) for node in nodes]
    assert [code for _, code in outcomes] == [0, 0], outcomes
    assert sorted(err for err, _ in outcomes) == ["", "stderr of rank 0\n"]
    sizes = [_environment(tmp_path / f"rank-{rank}")["WORLD_SIZE"] for rank in range(2)]
    assert sizes == ["2", "2"]


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (Topology(), "--standalone --local-addr 127.0.0.1 --nproc-per-node 1"),
        (
            Topology(nproc=8, max_restarts=2),
            "--standalone --local-addr 127.0.0.1 --nproc-per-node 8 --max-restarts 2",
        ),
        (
            Topology(nproc=8, nnodes=2, rdzv_endpoint="a:29500"),
            "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:29500 --rdzv-id slimstate"
            " --nproc-per-node 8",
        ),
        (
            Topology(nnodes=4, min_nodes=2, rdzv_endpoint="a:29500", max_restarts=3),
            "--nnodes 2:4 --rdzv-backend c10d --rdzv-endpoint a:29500 --rdzv-id slimstate"
            " --nproc-per-node 1 --max-restarts 3",
        ),
        (
            Topology(nnodes=2, node_rank=1, rdzv_endpoint="a:29500", rdzv_id="7"),
            "--nnodes 2 --node-rank 1 --rdzv-endpoint a:29500 --rdzv-id 7 --nproc-per-node 1",
        ),
    ],
)
def test_command_line_is_torchruns(topology: Topology, expected: str) -> None:
    from torch.distributed.run import config_from_args, parse_args

    arguments = ["it's", "a b", "--x=1"]
    words = shlex.split(Job(probe_stage.STAGE, arguments, None, topology).command_line())
    assert words[0] == "torchrun"
    assert words[1 : len(expected.split()) + 1] == expected.split()
    assert words[len(expected.split()) + 1 :] == ["-m", "tests.launch.probe_stage", *arguments]
    config, _, command = config_from_args(parse_args(words[1:]))
    assert config.min_nodes == (topology.min_nodes or topology.nnodes)
    assert (config.max_nodes, config.nproc_per_node) == (topology.nnodes, topology.nproc)
    assert command == ["-u", "-m", "tests.launch.probe_stage", *arguments]


def test_options_are_told_apart() -> None:
    arguments = ["MODEL", "--ratio", "-1", "--nproc=2", "--data.text", "a b", "--dry-run", "OUT"]
    topology, dry_run, rest = split_options(arguments)
    assert (topology, dry_run) == (Topology(nproc=2), True)
    assert rest == ["MODEL", "--ratio", "-1", "--data.text", "a b", "OUT"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "0"], "--nproc: 0 is not a whole number of at least 1"),
        (["--nproc", "-2"], "--nproc: -2 is not a whole number of at least 1"),
        (["--nproc", "two"], "--nproc: two is not a whole number of at least 1"),
        (["--nproc", "1.5"], "--nproc: 1.5 is not a whole number of at least 1"),
        (["--nproc"], "--nproc: expected one argument"),
        (["--nnodes", "0"], "--nnodes: 0 is not a whole number of at least 1"),
        (["--nnodes", "2:1"], "--nnodes: 2:1 is no range MIN:MAX"),
        (["--nnodes", "0:1"], "--nnodes: 0 is not a whole number of at least 1"),
        (["--max-restarts", "-1"], "--max-restarts: -1 is not a whole number of at least 0"),
    ],
)
def test_options_out_of_range(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        split_options(arguments)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (
            Topology(nnodes=2, min_nodes=1, node_rank=0, rdzv_endpoint="a:1"),
            "1:2 with --node-rank",
        ),
        (Topology(nnodes=2, min_nodes=1, rdzv_endpoint="a:1"), "1:2 needs --max-restarts"),
        (Topology(nnodes=2), "needs --rdzv-endpoint HOST:PORT"),
        (Topology(nnodes=2, node_rank=2, rdzv_endpoint="a:1"), "ranks go from 0 to 1"),
        (Topology(rdzv_endpoint="localhost"), "write it as HOST:PORT"),
        (Topology(rdzv_endpoint="localhost:99999"), "write it as HOST:PORT"),
        (Topology(rdzv_endpoint="no-such-host.invalid:29500"), "is no known host"),
    ],
)
def test_nodes_that_cannot_meet(topology: Topology, message: str) -> None:
    with pytest.raises(UserError, match=message):
        topology.check()


def test_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=r"cannot be opened here \(Address already in use\)"):
            Topology(nproc=2, rdzv_endpoint=endpoint).check()


@pytest.mark.slow
def test_port_of_something_else_is_refused_by_the_nodes_that_join() -> None:
    """torchrun would wait there for ever; where a job's first node answers, the others go on."""
    import torch.distributed as dist

    first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        for topology in (Topology(nnodes=2, node_rank=1), Topology(nnodes=2)):
            replace(topology, rdzv_endpoint=f"127.0.0.1:{first.port}").check()
            with pytest.raises(UserError, match="taken by something that is no torchrun job"):
                replace(topology, rdzv_endpoint=endpoint).check()


def test_cause_precedes_its_consequences(tmp_path: Path) -> None:
    """Rank 0 lost its peer, rank 2 was interrupted: rank 1's end is the cause."""
    failures.traceback_file(tmp_path, 0).write_text("Connection closed by peer\n")
    assert "rank 1 was ended by SIGSEGV" in failures.explain({0: 1, 1: -11, 2: 130}, tmp_path)
    failures.stderr_file(tmp_path, 1).write_text("noise\nslimstate: error: damaged\n")
    assert failures.explain({0: 1, 1: 1, 2: 130}, tmp_path) == "slimstate: error: damaged\n"


def _environment(file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


def _job(topology: str, *arguments: object, nameless: bool = False) -> subprocess.Popen[str]:
    words = [str(argument) for argument in arguments]
    code = (
        "from flame.errors import run_stage; from launch.processes.topology import Topology; "
        "from tests.launch.probe_stage import start; "
        f"run_stage(lambda: start({words}, {topology}))"
    )
    temporary = Path(str(arguments[-1]), "tmp")
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*(NAMELESS if nameless else ()), sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_workers(folder: Path, count: int) -> list[int]:
    files = [folder / f"pid-{rank}" for rank in range(count)]
    _wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def _wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A child of a dead launcher may stay a zombie where nothing reaps it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def _assert_nothing_left(folder: Path, pids: list[int], temporary: bool = True) -> None:
    assert not any(map(_alive, pids))
    assert not list(folder.glob("half-written-*"))
    if temporary:
        assert not list((folder / "tmp").iterdir())
