"""Outputs in awkward places: links, mounts, limits, file systems without flock."""

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flame.errors import UserError
from flame.process import file_lock
from flame.process.atomic_output import replacing_file, replacing_folder, writer_lock
from flame.process.output_checks import MADE, check_output, check_place, mark_as_made


def write(out: Path, overwrite: bool = False, text: str = "new") -> None:
    with replacing_folder(out, overwrite) as folder:
        (folder / "model").write_text(text)


def refused(out: Path, overwrite: bool = True) -> str:
    """What is said of a folder that cannot be written, before and after the work alike."""
    said = []
    for action in (lambda: check_output(out, overwrite), lambda: write(out, overwrite)):
        with pytest.raises(UserError) as caught:
            action()
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0]
    return said[0]


# What --overwrite replaces.


def test_a_folder_that_this_program_did_not_make_is_never_replaced(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter-1.tex").write_text("ten years")
    assert "was not made by slimstate (it holds chapter-1.tex)" in refused(thesis)
    assert (thesis / "chapter-1.tex").read_text() == "ten years"
    assert os.listdir(tmp_path) == ["thesis"]


def test_what_a_person_put_into_an_output_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    write(out, overwrite=True, text="newer")
    assert (out / "model").read_text() == "newer"
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt, which slimstate did not make" in refused(out)
    assert (out / "notes.txt").read_text() == "mine"


def test_an_empty_folder_may_be_replaced_and_a_planted_note_counts_for_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    (other / MADE).symlink_to(tmp_path / "empty" / MADE)
    assert "was not made by slimstate" in refused(other)


def test_names_are_added_to_those_noted_before(tmp_path: Path) -> None:
    for names in (["b"], ["a", MADE]):
        mark_as_made(tmp_path, names)
    for name in ("a", "b"):
        (tmp_path / name).touch()
    check_output(tmp_path, overwrite=True)


# Where an output lies.


def test_through_a_link_the_folder_is_replaced_on_its_own_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    write(disk / "out")
    link = tmp_path / "link"
    link.symlink_to(disk / "out")
    assert "exists: choose another" in refused(link, overwrite=False)
    write(link, overwrite=True, text="newer")
    assert link.is_symlink() and (disk / "out" / "model").read_text() == "newer"
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and os.listdir(disk) == ["out"]


def test_through_a_link_the_file_is_replaced_on_its_own_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_text("old")
    (tmp_path / "link").symlink_to("disk/file")
    with replacing_file(tmp_path / "link", overwrite=True) as file:
        file.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "new"


def test_one_output_has_one_lock_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with (
        writer_lock(tmp_path / "out"),
        pytest.raises(UserError, match="another job"),
        writer_lock(tmp_path / "link"),
    ):
        pass


@pytest.mark.parametrize("name", ["link", "link/deeper/out"])
def test_a_dangling_link_is_named_before_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    assert "is a link to /nowhere/at/all, which does not exist" in refused(tmp_path / name, False)
    with pytest.raises(UserError, match="which does not exist"):
        check_place(tmp_path / name)


def test_names_that_are_too_long_are_one_line(tmp_path: Path) -> None:
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="File name too long"):
        write(tmp_path / ("x" * 250))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder of ours with a space in its name, on which a file system is mounted."""
    place = tmp_path / "a b" / "out"
    write(place)
    if subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_mount_point_is_refused_before_work(mounted: Path) -> None:
    assert "where a disk is mounted" in refused(mounted)
    mark_as_made(mounted.parent, ["out"])
    assert "where a disk is mounted" in refused(mounted.parent)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_is_not_replaced(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "pipe" if kind == "pipe" else Path("/dev/null")
    if kind == "pipe":
        os.mkfifo(place)
    assert "is a device or a pipe" in refused(place)
    with pytest.raises(UserError, match="a device or a pipe"), replacing_file(place, True):
        pass


# What others have planted.


def test_nothing_is_written_through_a_planted_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"
    for name in (".out.tmp", ".out.slimstate.tmp", ".out.slimstate.old"):
        (tmp_path / name).symlink_to(victim)
    with replacing_file(out) as file:
        file.write_text("new")
    assert (victim.read_text(), out.read_text()) == ("precious", "new")
    assert not out.is_symlink()


def test_a_planted_lock_is_named(tmp_path: Path) -> None:
    lock = tmp_path / ".out.lock"
    lock.symlink_to(tmp_path / "made elsewhere")
    assert "is a link, and should be a lock file" in _lock(tmp_path / "out")
    lock.unlink()
    os.mkfifo(lock)
    assert "should be a lock file and is none" in _lock(tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.lock"]


def _lock(out: Path) -> str:
    with pytest.raises(UserError) as caught, writer_lock(out):
        pass
    return str(caught.value)


# What libraries leave, and what disks say.


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with replacing_folder(tmp_path / "out") as folder:
            (folder / "deeper").mkdir()
            # It makes files that nobody else may read.
            save_file({"x": torch.zeros(1)}, folder / "deeper" / "model.safetensors")
        with replacing_file(tmp_path / "file") as file:
            save_file({"x": torch.zeros(1)}, file)
    finally:
        os.umask(before)
    for path in (tmp_path / "out" / "deeper" / "model.safetensors", tmp_path / "file"):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_limit_on_file_sizes_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        for save in (lambda path: path.write_bytes(bytes(1 << 17)), _save_tensors):
            with (
                pytest.raises(UserError, match=r"cannot write .*: File too large"),
                replacing_folder(tmp_path / "out") as folder,
            ):
                save(folder / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def _save_tensors(path: Path) -> None:
    save_file({"x": torch.zeros(1 << 16)}, path)


def test_a_fault_of_the_disk_says_which_file(tmp_path: Path) -> None:
    fault = OSError(errno.EIO, "Input/output error", "/elsewhere/model")
    with (
        pytest.raises(UserError, match="cannot read /elsewhere/model: Input/output error"),
        replacing_folder(tmp_path / "out"),
    ):
        raise fault
    with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "out"):
        open(tmp_path / "missing").close()


# File systems without flock.


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    file_lock._say_once.cache_clear()


WITHOUT = pytest.mark.parametrize(
    "no_flock", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], indirect=True
)


@WITHOUT
def test_without_flock_a_file_says_who_writes(
    tmp_path: Path, no_flock: None, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with writer_lock(out):
        said = _lock(out)
        today = time.strftime("%Y-%m-%d")
        assert f"(process {os.getpid()} on {os.uname().nodename} since {today}" in said
        assert f"if it has ended, remove {tmp_path / '.out.lock.owner'})" in said
    with writer_lock(out):
        pass
    assert os.listdir(tmp_path) == []
    assert sum("has no flock" in record.message for record in caplog.records) == 1


@WITHOUT
def test_without_flock_a_dead_job_holds_nothing_on_its_machine(
    tmp_path: Path, no_flock: None
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner, out = tmp_path / ".out.lock.owner", tmp_path / "out"
    owner.write_text(f"process {dead.pid} on another-machine since 2026-01-01 00:00:00")
    assert "another-machine since 2026-01-01" in _lock(out)
    owner.write_text(f"process {dead.pid} on {os.uname().nodename} since 2026-01-01 00:00:00")
    with writer_lock(out):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("no_flock", [errno.EIO], indirect=True)
def test_an_error_of_the_lock_is_not_called_another_job(tmp_path: Path, no_flock: None) -> None:
    assert "cannot write" in _lock(tmp_path / "out")
