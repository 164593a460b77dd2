"""Hashing and loading a step together: each byte is read about once for all ranks, and no damage
passes."""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.counting import reads_of
from benchmarks.simulated_world import bytes_read, rank_of, training_state, write_step
from flame.checkpoint.dcp_source import DcpSource
from flame.checkpoint.fingerprint import finite_parts
from flame.checkpoint.load import load_weights
from flame.checkpoint.save import save_step
from flame.checkpoint.verify import dealt, verify_together
from flame.errors import UserError
from flame.process import peers
from flame.process.peers import Peers
from flame.storage.load_step import load_step
from tests.distributed import run_distributed
from tests.flame.damage import flip_byte

WEIGHTS = {f"layers.{number}.weight": (64, 256) for number in range(3)}
WHOLE = {"layers.0.A_log": (8,)}
LARGE = {f"weight_{number}": (512, 1024) for number in range(8)}


def _sizes(step: Path) -> Counter[str]:
    return Counter({file.name: file.stat().st_size for file in step.iterdir()})


@pytest.mark.parametrize("sharers", [1, 3, 8, 64])
def test_each_file_is_dealt_once_and_to_the_rank_that_wrote_it(sharers: int) -> None:
    names = [".metadata", "dataloader.json", *(f"__{rank}_0.distcp" for rank in range(64))]
    shares = [dealt(names, place, sharers) for place in range(sharers)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert all(f"__{rank}_0.distcp" in shares[rank * sharers // 64] for rank in range(64))
    few = [dealt(names[:10], place, sharers) for place in range(sharers)]
    assert max(map(len, few)) <= -(-8 // sharers) + -(-2 // sharers)


def _verify_and_load(steps: list[Path]) -> tuple[Counter[str], Counter[str], str]:
    """What this rank reads to verify its copy of a step, what to load it, and the complaint."""
    rank = dist.get_rank()
    step = steps[rank * len(steps) // dist.get_world_size()]
    state, complaint = training_state(WEIGHTS, WHOLE), ""
    with reads_of(step) as verifying:
        try:
            verify_together(step)
        except UserError as error:
            complaint = str(error)
    with reads_of(step) as loading:
        if not complaint:
            load_step(state, step)
            full = state["layers.1.weight"].full_tensor()
            assert torch.equal(full, DcpSource(step).read("layers.1.weight"))
    return verifying, loading, complaint


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_hashing_and_trust_each_other(tmp_path: Path, world_size: int) -> None:
    step = write_step(tmp_path, 1, WEIGHTS, WHOLE, world_size, world_size)
    sizes = _sizes(step)
    found = run_distributed(_verify_and_load, world_size, [step])
    hashed = sum((verifying for verifying, _, _ in found), Counter[str]())
    assert hashed == sizes - Counter({"checksums.json": sizes["checksums.json"]})
    assert [complaint for _, _, complaint in found] == [""] * world_size
    index = sizes[".metadata"] * world_size * 2
    loaded = sum(sum(loading.values()) for _, loading, _ in found) - index
    # The comparison with the whole tensor reads it once more on every rank.
    again = world_size * 64 * 256 * 4
    assert loaded < 1.05 * sum(sizes.values()) + again


def test_every_node_hashes_its_own_copy(tmp_path: Path) -> None:
    first = write_step(tmp_path / "node0", 1, WEIGHTS, WHOLE, 4, 2)
    second = tmp_path / "node1" / "step-1"
    shutil.copytree(first, second)
    found = run_distributed(_verify_and_load, 4, [first, second])
    for node in (found[:2], found[2:]):
        hashed = sum((verifying for verifying, _, _ in node), Counter[str]())
        assert hashed == _sizes(first) - Counter({"checksums.json": 10**9})
    # Ranks of one job trust what they have verified, so damage is looked for in another copy.
    third = tmp_path / "node2" / "step-1"
    shutil.copytree(first, third)
    flip_byte(third / "__0_0.distcp")
    complaints = {text for _, _, text in run_distributed(_verify_and_load, 4, [first, third])}
    assert len(complaints) == 1
    assert "node2/step-1/__0_0.distcp is damaged (its hash differs)" in complaints.pop()


def test_a_process_by_itself_hashes_a_step_once_and_a_new_one_again(tmp_path: Path) -> None:
    step = save_step({"w": torch.ones(50, 50)}, tmp_path, 1, alone=True)
    with reads_of(step) as counted:
        verify_together(step)
        verify_together(step)
        assert counted["__0_0.distcp"] == _sizes(step)["__0_0.distcp"]
        DcpSource(step).read("w")
    assert counted["__0_0.distcp"] < 2.1 * _sizes(step)["__0_0.distcp"]
    save_step({"w": torch.zeros(50, 50)}, tmp_path, 1, alone=True)
    flip_byte(step / "__0_0.distcp")
    with pytest.raises(UserError, match="is damaged"):
        DcpSource(step).read("w")


def _answer_in_pieces(piece: int) -> tuple[int, str]:
    peers.PIECE = piece
    read, rounds, rank = 0, 0, dist.get_rank()
    sums = Peers._sums

    def counting(self: Peers, *flags: bool) -> list[int]:
        nonlocal rounds
        rounds += 1
        return sums(self, *flags)

    def parts() -> Any:
        nonlocal read
        for _ in range(8 if rank == 0 else 2):
            read += 5
            yield 5
        if rank == 1:
            raise UserError("tensor 7 is broken")

    Peers._sums = counting  # type: ignore[method-assign]
    try:
        Peers().go_through(parts())
    except UserError as error:
        return rounds, str(error)
    finally:
        Peers._sums, peers.PIECE = sums, 4 << 30  # type: ignore[method-assign]
    return rounds, ""


def test_ranks_with_less_to_read_wait_in_pieces(tmp_path: Path) -> None:
    """So no wait is longer than a piece takes, and an error ends them all."""
    assert run_distributed(_answer_in_pieces, 2, 10) == [(2, "tensor 7 is broken")] * 2


def _init(step: Path, model: nn.Module) -> None:
    """What a rank reads of `--init`: its share of hashes and of values, and its own rows."""
    verify_together(step)
    for _ in finite_parts(DcpSource(step), dist.get_rank(), dist.get_world_size()):
        pass
    load_weights(model, DcpSource(step))


def _resume(step: Path, state: dict[str, Any]) -> None:
    verify_together(step)
    for _ in finite_parts(DcpSource(step), dist.get_rank(), dist.get_world_size()):
        pass
    load_step(state, step)


@pytest.mark.parametrize("start", ["resume", pytest.param("init", marks=pytest.mark.slow)])
@pytest.mark.parametrize("written_by", [64, 8])
def test_a_node_of_eight_reads_a_third_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, written_by: int
) -> None:
    """Ranks of the first and the last of 8 nodes, one after another in this process."""
    step = write_step(tmp_path, 1, LARGE, {}, written_by, 8)
    of_nodes: Counter[int] = Counter()
    for rank in (*range(8), *range(56, 64)):
        # Each rank is a process of its own, which trusts none but its peers in this start.
        monkeypatch.setattr("flame.storage.compared._compared", set())
        with rank_of(rank, 64, 8):
            state, model = training_state(LARGE, {}), nn.Module()
            for name in LARGE:
                model.register_buffer(name, state[name])
            before = bytes_read()
            _resume(step, state) if start == "resume" else _init(step, model)
            of_nodes[rank // 8] += bytes_read() - before
    checkpoint = sum(_sizes(step).values())
    # Hashes, and values: of all tensors or of the weights, an eighth each; the index besides.
    wanted = (1 + 1 / 3 + (1 if start == "resume" else 1 / 3)) / 8
    index = (2 if start == "resume" else 3) * 8 * _sizes(step)[".metadata"] / checkpoint
    for node in of_nodes:
        assert of_nodes[node] / checkpoint == pytest.approx(wanted + index, rel=0.15)
    assert wanted + index < 1.2


def _read_until_killed(said: Path) -> None:
    def parts() -> Any:
        yield 1
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield 1

    try:
        Peers().go_through(parts())
    except RuntimeError as error:
        said.write_text(str(error))


@pytest.mark.slow
def test_ranks_do_not_wait_for_one_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a worker died with exit code -9"):
        run_distributed(_read_until_killed, 2, tmp_path / "said")
    # Its end is noticed, and not waited for until the group's timeout.
    text = (tmp_path / "said").read_text()
    assert "onnection" in text and "Timed out" not in text
