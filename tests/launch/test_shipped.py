"""The recipes that come with slimstate: listed, shown, copied; in a wheel too."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flame.errors import UserError
from launch.cli import dispatch
from launch.shipped import FOLDER, names

ROOT = Path(__file__).parents[2]


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    dispatch(["recipes"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == names()
    assert all(len(line.split()) > 3 for line in listed)
    dispatch(["recipes", "--show", "mqar"])
    assert capsys.readouterr().out.strip() == (FOLDER / "mqar.toml").read_text().strip()


def test_a_copy_is_complete_and_replaces_nothing(tmp_path: Path) -> None:
    from flame.config import parse_job

    dispatch(["recipes", "--copy", "gated_deltanet_370M", "--to", str(tmp_path)])
    recipe = tmp_path / "gated_deltanet_370M.toml"
    job = parse_job(["--job.config_file", str(recipe)])
    assert job.model.config == str(tmp_path / "gated_deltanet_370M.json")
    dispatch(["recipes", "--copy", "small_sweep", "--to", str(tmp_path)])
    assert (tmp_path / "small_recover.toml").is_file()
    recipe.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        dispatch(["recipes", "--copy", "gated_deltanet_370M", "--to", str(tmp_path)])
    assert recipe.read_text() == "mine"
    with pytest.raises(UserError, match="did you mean delta_net_370M?"):
        dispatch(["recipes", "--copy", "delta_net_370"])


@pytest.mark.slow
def test_a_wheel_has_them(tmp_path: Path) -> None:
    words = ["wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"launch/recipes/{path.name}" for path in FOLDER.iterdir()} <= held
