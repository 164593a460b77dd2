"""Options of `[comm]`: timeouts and the flight recorder."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.flame.jobs import make_job


def test_the_recorder_is_set_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flame.run_folder.flight_recorder import FILES, SIZE, flight_recorder

    for name in (SIZE, FILES):
        monkeypatch.delenv(name, raising=False)
    job = make_job(tmp_path, tmp_path / "run", comm__trace_buf_size=2000)
    found = flight_recorder(job)
    assert (found[SIZE], found[FILES]) == ("2000", str(tmp_path / "run/comm_traces/rank_"))
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert flight_recorder(make_job(tmp_path, tmp_path / "run")) == {SIZE: "0"}
    monkeypatch.setenv(SIZE, "7")
    assert SIZE not in flight_recorder(job)


def seen_by(assets: Path, out: Path) -> tuple[str | None, timedelta]:
    """What a job's process group gets of `[comm]`: the recorder's size and the timeout."""
    from flame import train
    from flame.process import distributed
    from flame.training import start_checks

    found: list[Any] = []
    group, check = distributed.process_group, start_checks.check_start

    def starting(timeout: timedelta) -> Any:
        found.extend([os.environ.get("TORCH_FR_BUFFER_SIZE"), timeout])
        return group(timeout)

    def leave(job: Any) -> None:
        raise KeyError("seen")

    distributed.process_group, start_checks.check_start = starting, leave  # type: ignore[assignment]
    try:
        options = {"comm__trace_buf_size": 11, "comm__init_timeout_seconds": 77}
        train.train(make_job(assets, out, **options))
    except KeyError:
        pass
    finally:
        distributed.process_group, start_checks.check_start = group, check
    return found[0], found[1]


def test_the_process_group_starts_with_both(assets: Path, tmp_path: Path) -> None:
    (found,) = run_distributed(seen_by, 1, assets, tmp_path / "run")
    assert found == ("11", timedelta(seconds=77))
    assert not (tmp_path / "run").exists()
