"""Runs that several tests look at."""

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.flame.jobs import train_job, write_assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model config, a tokenizer and a text file to train on."""
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def two_ranks(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run on two processes."""
    run = tmp_path_factory.mktemp("runs") / "two"
    run_distributed(train_job, 2, assets, run)
    return run
