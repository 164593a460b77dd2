"""Refitted gates: at every world size, through run folders, and with repairs after them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flame.checkpoint.convert import convert
from flame.checkpoint.reference import resolve
from pruning import apply, calibrate, plan
from pruning.adapters import ADAPTERS
from pruning.repair.gates import gates_of
from tests.distributed import run_distributed
from tests.pruning.hybrids import build
from tests.pruning.kda_hybrids import CONFIGS
from tests.pruning.models import tensors_in, write_hf, write_text
from tests.pruning.repair.test_repair import (
    complaint,
    data_words,
    expected_projections,
    pruned,
    stage,
)

pytestmark = pytest.mark.slow

CONFIG = CONFIGS["kimi_linear"]
SQUARE = ("--method", "l1", "--space", "square", "--ratio", "0.5", "--multiple-of", "1")
GATES = {n for s in ADAPTERS["kimi_linear"].spaces(CONFIG) for pair in gates_of(s) for n in pair}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    write_text(folder)
    state = {name: x.clone().contiguous() for name, x in build(CONFIG).state_dict().items()}
    write_hf(folder / "kimi_linear", CONFIG, state)
    return folder


def plan_of(out: Path) -> dict:
    content = json.loads((out / "plan.json").read_text())
    assert content.pop("replaced")["hash"]
    return content


def gates_in(out: Path) -> dict[str, Tensor]:
    return load_file(out / "plan.tensors.safetensors")


def test_gates_are_the_same_at_every_world_size_and_by_stages(home: Path, tmp_path: Path) -> None:
    model, words = home / "kimi_linear", (*SQUARE, *data_words(home))
    for world in (1, 2):
        run_distributed(pruned, world, model, tmp_path / f"out-{world}", *words)
    one, two = tmp_path / "out-1", tmp_path / "out-2"
    assert plan_of(one) == plan_of(two)
    assert gates_in(one).keys() == GATES
    torch.testing.assert_close(gates_in(two), gates_in(one), rtol=1e-8, atol=1e-10)
    file, stats = tmp_path / "plan.json", tmp_path / "stats"
    assert "--stats" in complaint(plan, model, file, *SQUARE)
    stage(calibrate, model, stats, "--methods", "l1", *data_words(home))
    stage(plan, model, file, *SQUARE, "--stats", stats)
    stage(apply, model, file, tmp_path / "by-stages")
    assert plan_of(tmp_path / "by-stages") == plan_of(one)
    written, wanted = (tensors_in(resolve(out).source()) for out in (tmp_path / "by-stages", one))
    torch.testing.assert_close(written, wanted, rtol=1e-6, atol=1e-7)


def test_a_run_folder_and_back_is_the_same_model(home: Path, tmp_path: Path) -> None:
    """The dense model becomes a run, which is pruned as one, and that becomes a folder again."""
    words = (*SQUARE, *data_words(home))
    pruned(home / "kimi_linear", tmp_path / "hf", *words)
    convert(resolve(home / "kimi_linear"), tmp_path / "run", "dcp")
    pruned(tmp_path / "run", tmp_path / "slim", *words)
    assert resolve(tmp_path / "slim").kind == "dcp"
    convert(resolve(tmp_path / "slim"), tmp_path / "back", "hf")
    found, wanted = (tensors_in(resolve(tmp_path / name).source()) for name in ("back", "hf"))
    assert found.keys() == wanted.keys() >= GATES
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_output_projections_are_refitted_to_the_narrower_gates(home: Path, tmp_path: Path) -> None:
    words = (*SQUARE, *data_words(home))
    pruned(home / "kimi_linear", tmp_path / "plain", *words)
    pruned(home / "kimi_linear", tmp_path / "out", *words, "--repair", "output")
    expected = expected_projections(home, "kimi_linear", tmp_path / "plain")
    plain, found = (tensors_in(resolve(tmp_path / name).source()) for name in ("plain", "out"))
    for name, tensor in found.items():
        if name in expected:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5)
            assert not torch.equal(tensor, plain[name])
        else:
            assert torch.equal(tensor, plain[name])


def test_local_steps_lower_the_error_of_narrower_gates(home: Path, tmp_path: Path) -> None:
    steps = ("--repair", "layer", "--repair-steps", "8", "--repair-batch", "2")
    pruned(home / "kimi_linear", tmp_path / "out", *SQUARE, *steps, *data_words(home))
    repair = plan_of(tmp_path / "out")["repair"]
    assert (repair["kind"], repair["layers"]) == ("layer", [0, 2])
    assert gates_in(tmp_path / "out").keys() > GATES
