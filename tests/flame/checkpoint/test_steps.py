"""Whole steps: saved whole or not at all, found, verified and purged."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, state_dict_loader

from flame.checkpoint.save import save_step
from flame.checkpoint.steps import (
    METADATA,
    broken_steps,
    is_whole,
    latest_whole_step,
    purge,
    verify_step,
    whole_steps,
)
from flame.errors import UserError
from flame.storage.checksums import CHECKSUMS, hash_file
from flame.storage.load_step import load_step
from flame.storage.safe_reader import SafeReader
from tests.distributed import run_distributed
from tests.flame.damage import Bomb, flip_byte, rewrite


def _state(fill: float = 0.0) -> dict[str, Any]:
    """A state nested like torchtitan's: model at the top, the rest below."""
    return {
        "model.a.weight": torch.arange(12.0).view(4, 3) + fill,
        "model.b.weight": torch.full((5,), 1.5, dtype=torch.bfloat16) + fill,
        "optimizer": {"state.model.a.weight.exp_avg": torch.ones(4, 3) * fill, "lr": 0.25 + fill},
        "lr_scheduler": {"last_epoch": 7, "_last_lr": [0.1, 0.2]},
        "train_state": {"step": torch.tensor(3)},
    }


def _save(folder: Path, step: int, fill: float = 0.0, **options: Any) -> Path:
    return save_step(_state(fill), folder, step, alone=True, **options)


def _shard(step: Path) -> Path:
    return next(step.glob("*.distcp"))


def test_a_saved_step_is_whole_and_comes_back(tmp_path: Path) -> None:
    step = _save(tmp_path, 3, fill=1.0, extra_files={"dataloader.json": b'{"a": 1}'})
    assert step == tmp_path / "step-3" and whole_steps(tmp_path) == [3]
    assert sorted(os.listdir(tmp_path)) == ["step-3"]
    verify_step(step)
    loaded = _state()
    load_step(loaded, step)
    expected = _state(1.0)
    assert torch.equal(loaded["model.a.weight"], expected["model.a.weight"])
    assert torch.equal(loaded["model.b.weight"], expected["model.b.weight"])
    moment = "state.model.a.weight.exp_avg"
    assert torch.equal(loaded["optimizer"][moment], expected["optimizer"][moment])
    assert loaded["optimizer"]["lr"] == 1.25
    assert loaded["lr_scheduler"] == expected["lr_scheduler"]
    assert (step / "dataloader.json").read_bytes() == b'{"a": 1}'


def test_checksums_cover_every_other_file(tmp_path: Path) -> None:
    step = _save(tmp_path, 1, extra_files={"dataloader.json": b"{}"})
    content = json.loads((step / CHECKSUMS).read_text())
    assert content["algorithm"] == "xxh3_128"
    assert set(content["files"]) == set(os.listdir(step)) - {CHECKSUMS}
    assert all(hash_file(step / name) == value for name, value in content["files"].items())


def test_stock_torch_reads_what_was_saved(tmp_path: Path) -> None:
    step = _save(tmp_path, 1, fill=2.0)
    loaded: dict[str, Any] = {"model.a.weight": torch.zeros(4, 3)}
    state_dict_loader.load(loaded, storage_reader=FileSystemReader(step), no_dist=True)
    assert torch.equal(loaded["model.a.weight"], _state(2.0)["model.a.weight"])


def test_promised_tensors_are_read_one_by_one(tmp_path: Path) -> None:
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return torch.full((2, 2), float(len(asked)))

    promises = {name: torch.empty(2, 2, device="meta") for name in ("x", "y")}
    step = save_step(promises, tmp_path, 0, read=read, alone=True)
    assert asked == ["x", "y"]
    loaded = {"y": torch.zeros(2, 2)}
    load_step(loaded, step)
    assert torch.equal(loaded["y"], torch.full((2, 2), 2.0))


def test_only_whole_steps_count(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        _save(tmp_path, step)
    for name in ("step-11", "step-x", "step-012", "old-step-99", "tmp-12-ab"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-13").write_text("a file")
    (tmp_path / "step-10" / METADATA).unlink()
    assert whole_steps(tmp_path) == [1, 2] and latest_whole_step(tmp_path) == 2
    assert broken_steps(tmp_path) == ["step-10", "step-11"]
    assert whole_steps(tmp_path / "missing") == [] and latest_whole_step(tmp_path / "no") is None


@pytest.mark.parametrize("damage", ["shard", "empty shard", "metadata", "checksums", "garbage"])
def test_a_step_that_lacks_a_part_is_not_whole(tmp_path: Path, damage: str) -> None:
    step = _save(tmp_path, 1)
    {
        "shard": lambda: _shard(step).unlink(),
        "empty shard": lambda: _shard(step).write_bytes(b""),
        "metadata": lambda: (step / METADATA).write_bytes(b""),
        "checksums": lambda: (step / CHECKSUMS).unlink(),
        "garbage": lambda: (step / CHECKSUMS).write_bytes(b"\xff{"),
    }[damage]()
    assert not is_whole(step)


def test_purging_keeps_the_last_whole_steps(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    (tmp_path / "step-9").mkdir()
    (tmp_path / "tmp-4-dead").mkdir()
    purge(tmp_path, 2)
    assert whole_steps(tmp_path) == [2, 3]
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-3", "step-9"]
    (tmp_path / "step-3" / METADATA).unlink()
    purge(tmp_path, 1)
    assert whole_steps(tmp_path) == [2]
    purge(tmp_path, 0)
    assert whole_steps(tmp_path) == [2]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    _save(tmp_path, 1, fill=1.0)
    _save(tmp_path, 1, fill=2.0)
    loaded = {"model.a.weight": torch.zeros(4, 3)}
    load_step(loaded, tmp_path / "step-1")
    assert torch.equal(loaded["model.a.weight"], _state(2.0)["model.a.weight"])
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    _save(tmp_path, 1)

    def read(name: str) -> Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        save_step({"x": torch.empty(2, device="meta")}, tmp_path, 2, read=read, alone=True)
    assert os.listdir(tmp_path) == ["step-1"]


def _load(step: Path) -> None:
    load_step({"model.a.weight": torch.zeros(4, 3), "train_state": {"step": torch.tensor(0)}}, step)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped byte": (lambda step: flip_byte(_shard(step)), r"\.distcp is damaged"),
    "truncated shard": (lambda step: os.truncate(_shard(step), 100), r"\.distcp is damaged"),
    "missing shard": (lambda step: _shard(step).unlink(), r"\.distcp is missing"),
    "missing index": (lambda step: (step / METADATA).unlink(), r"\.metadata is missing"),
    "empty index": (lambda step: os.truncate(step / METADATA, 0), r"\.metadata is damaged"),
    "flipped index": (lambda step: flip_byte(step / METADATA), r"\.metadata is damaged"),
    "no checksums": (lambda step: (step / CHECKSUMS).unlink(), "has no checksums.json"),
    "bad checksums": (
        lambda step: (step / CHECKSUMS).write_text("{"),
        "checksums.json is not JSON",
    ),
    "no object": (lambda step: (step / CHECKSUMS).write_text("[]"), "json is not a JSON object"),
    "other checksums": (lambda step: (step / CHECKSUMS).write_text("{}"), "is not a list"),
    "empty but hashed index": (lambda step: rewrite(step, METADATA, b""), "not a DCP index"),
    "another pickle": (
        lambda step: rewrite(step, METADATA, pickle.dumps({"a": 1})),
        "not a DCP index",
    ),
    "truncated but hashed shard": (
        lambda step: rewrite(step, _shard(step).name, _shard(step).read_bytes()[:200]),
        "cannot read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_one_line(tmp_path: Path, damage: str) -> None:
    step = _save(tmp_path, 1)
    harm, message = DAMAGES[damage]
    harm(step)
    with pytest.raises(UserError, match=message) as caught:
        _load(step)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("damage", ["flipped byte", "truncated shard", "missing shard"])
def test_verifying_finds_damage(tmp_path: Path, damage: str) -> None:
    step = _save(tmp_path, 1)
    verify_step(step)
    DAMAGES[damage][0](step)
    with pytest.raises(UserError, match="distcp is"):
        verify_step(step)


def test_a_hostile_index_does_not_run(tmp_path: Path) -> None:
    step = _save(tmp_path, 1)
    harm = tmp_path / "was-run"
    bomb = pickle.dumps(Bomb(harm))
    pickle.loads(bomb)
    harm.rmdir()
    rewrite(step, METADATA, bomb)
    with pytest.raises(UserError, match=r"posix\.mkdir"):
        _load(step)
    assert not harm.exists()


def test_a_hostile_entry_does_not_run(tmp_path: Path) -> None:
    harm = tmp_path / "was-run"
    step = save_step({"x": Bomb(harm)}, tmp_path / "checkpoint", 1, alone=True)
    with pytest.raises(UserError, match="entry x of the checkpoint is not plain data"):
        load_step({"x": 0}, step)
    assert not harm.exists()


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    step = _save(tmp_path, 1)
    index = SafeReader(step).read_metadata()
    for place in index.storage_data.values():
        place.relative_path = f"../{place.relative_path}"
    rewrite(step, METADATA, pickle.dumps(index))
    with pytest.raises(UserError, match="which is no file of the step"):
        _load(step)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    step = _save(tmp_path, 1)
    with pytest.raises(UserError, match=r"lacks model\.c\.weight"):
        load_step({"model.c.weight": torch.zeros(1)}, step)
    with pytest.raises(UserError, match=r"model.a.weight has shape \(4, 3\).*\(3, 4\)"):
        load_step({"model.a.weight": torch.zeros(3, 4)}, step)


def _save_sharded(folder: Path, step: int) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)])
    save_step({"w": weight, "n": {"epoch": 4}}, folder, step, {"dataloader.json": b"{}"})
    assert whole_steps(folder) == [step]


def _load_damaged(step: Path) -> str:
    try:
        load_step({"w": torch.zeros(5, 3)}, step)
    except UserError as error:
        return str(error)
    return "nothing raised"


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_save_together(tmp_path: Path, world_size: int) -> None:
    run_distributed(_save_sharded, world_size, tmp_path, 5)
    verify_step(tmp_path / "step-5")
    assert os.listdir(tmp_path) == ["step-5"]
    loaded: dict[str, Any] = {"w": torch.zeros(5, 3), "n": {"epoch": 0}}
    load_step(loaded, tmp_path / "step-5")
    assert torch.equal(loaded["w"], torch.arange(15.0).view(5, 3)) and loaded["n"]["epoch"] == 4


def _fail_on_last_rank(folder: Path) -> str:
    import torch.distributed as dist

    def read(name: str) -> Tensor:
        raise OSError(30, "Read-only file system")

    rank = dist.get_rank()
    state = {f"w{rank}": torch.ones(2, device="meta" if rank else "cpu")}
    try:
        save_step(state, folder, 1, read=read)
    except UserError as error:
        return str(error)
    return "nothing raised"


def test_every_rank_raises_the_error_of_one(tmp_path: Path) -> None:
    messages = run_distributed(_fail_on_last_rank, 2, tmp_path)
    assert all("Read-only file system" in message for message in messages)
    assert os.listdir(tmp_path) == []
    run_distributed(_save_sharded, 2, tmp_path, 5)
    flip_byte(tmp_path / "step-5" / "__1_0.distcp")
    messages = run_distributed(_load_damaged, 2, tmp_path / "step-5")
    assert messages[0] == messages[1] and "__1_0.distcp is damaged" in messages[0]
    (tmp_path / "step-5" / METADATA).write_bytes(b"x")
    messages = run_distributed(_load_damaged, 2, tmp_path / "step-5")
    assert messages[0] == messages[1] and ".metadata is damaged" in messages[0]


# --- killed savers ----------------------------------------------------------------------------

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["torch", "flame.checkpoint.steps", "flame.storage.safe_reader"])
_WATCHED = ("open", "os.mkdir", "os.rename")
_DELETIONS = ("os.remove", "os.rmdir")


def _save_loop(folder: Path) -> None:
    torch.set_num_threads(1)
    for step in range(10_000):
        _save(folder, step, fill=float(step))
        purge(folder, 1)


def _die_at_event(folder: Path, number: int, steps: tuple[int, ...]) -> None:
    """Save `steps`, purging each time, and die just before the `number`-th file operation."""
    torch.set_num_threads(1)
    seen = 0

    def on_event(event: str, arguments: tuple) -> None:
        nonlocal seen
        within = event in _WATCHED and str(folder) in str(arguments[0])
        if within or event in _DELETIONS:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    for step in steps:
        _save(folder, step, fill=float(step))
        purge(folder, 1)


def _assert_recoverable(folder: Path, at_least: int) -> None:
    latest = latest_whole_step(folder)
    assert latest is not None and latest >= at_least
    for step in whole_steps(folder):
        verify_step(folder / f"step-{step}")
    loaded = {"model.a.weight": torch.zeros(4, 3)}
    load_step(loaded, folder / f"step-{latest}")
    _save(folder, latest + 1)
    purge(folder, 1)
    assert os.listdir(folder) == [f"step-{latest + 1}"]


@pytest.mark.parametrize("steps", [(2,), (1,)], ids=["next step", "same step again"])
def test_a_kill_before_any_file_operation_leaves_a_whole_step(
    tmp_path: Path, steps: tuple[int, ...]
) -> None:
    for number in range(1, 200):
        folder = tmp_path / str(number)
        _save(folder, 1)
        process = _FORKSERVER.Process(target=_die_at_event, args=(folder, number, steps))
        process.start()
        process.join(60)
        _assert_recoverable(folder, at_least=1)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert 10 < number < 199


def test_a_kill_at_random_moments_leaves_a_whole_step(tmp_path: Path) -> None:
    moments = random.Random(0)
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        _save(folder, 0)
        process = _FORKSERVER.Process(target=_save_loop, args=(folder,))
        process.start()
        while not latest_whole_step(folder):
            time.sleep(0.01)
        time.sleep(0.1 * moments.random())
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        _assert_recoverable(folder, at_least=0)
