"""Steps of torchtitan, flame and plain DCP: read to the bit or refused, and ours read by them."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from flame.checkpoint.convert import convert
from flame.checkpoint.foreign import GivenFiles
from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.storage.checksums import CHECKSUMS, METADATA
from tests.distributed import run_distributed
from tests.flame.checkpoint.other_programs import read_with_titan, save_plain, write_titan_run
from tests.flame.jobs import make_job
from tests.flame.tiny import GATED_DELTANET, LLAMA, build, write_hf_folder, write_run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def titan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run of torchtitan on two ranks, and the weights of its last step."""
    run = tmp_path_factory.mktemp("titan")
    full = run_distributed(write_titan_run, 2, run, GATED_DELTANET, last_save_model_only=False)[0]
    return run, full


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> GivenFiles:
    """A config file and a tokenizer folder, which lie elsewhere."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "model.json").write_text(json.dumps(GATED_DELTANET))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    return GivenFiles(folder / "model.json", folder / "tokenizer")


def _assert_loads(reference: Any, expected: dict[str, Tensor]) -> None:
    found = load_model(reference).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_torchtitan_s_steps_are_models(
    titan: tuple[Path, dict[str, Tensor]], given: GivenFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    run, full = titan
    step = run / "checkpoint" / "step-4"
    assert not (step / CHECKSUMS).exists()
    for name in (run, run / "checkpoint", step):
        reference = given.resolve(name)
        assert reference.unverified and reference.step_folder == step
        assert reference.tokenizer == given.model_tokenizer
        _assert_loads(reference, full)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "unverified" in line] == said and len(said) == 1
    earlier = resolve(run, step=3, given=given)
    assert earlier.step_folder == run / "checkpoint" / "step-3"
    with pytest.raises(UserError, match="has no step 5: choose from 3, 4"):
        resolve(run, step=5, given=given)


def test_a_config_beside_the_steps_needs_no_option(
    titan: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(titan[0], tmp_path / "run")
    with pytest.raises(UserError, match=r"give --model-config FILE.*or put a config\.json there"):
        resolve(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(GATED_DELTANET))
    _assert_loads(resolve(tmp_path / "run"), titan[1])


def _state() -> dict[str, Tensor]:
    return dict(build(GATED_DELTANET).state_dict())


def _compiled() -> dict[str, Tensor]:
    names = (re.sub(r"^model\.layers\.(\d+)\.", r"model.layers.\1._orig_mod.", n) for n in _state())
    return dict(zip(names, _state().values(), strict=True))


FOREIGN: dict[str, Callable[[], dict[str, Any]]] = {
    "top level": lambda: {**_state(), "optimizer": {"lr": 1}, "train_state": {"step": 3}},
    "below model": lambda: {"model": _state(), "optimizer": {"state": {"x": torch.ones(1)}}},
    "compiled": lambda: {f"_orig_mod.{name}": value for name, value in _compiled().items()},
    "below model and compiled": lambda: {"model": _compiled(), "dataloader": {"rank": b"\x80N."}},
    "DDP": lambda: {f"module.{name}": value for name, value in _state().items()},
    "half precision": lambda: {name: value.bfloat16() for name, value in _state().items()},
}


@pytest.mark.parametrize("form", FOREIGN)
def test_every_form_of_names_is_read_and_converted_to_the_bit(
    tmp_path: Path, given: GivenFiles, form: str
) -> None:
    from transformers import AutoModelForCausalLM

    step = save_plain(FOREIGN[form](), tmp_path / "run" / "checkpoint" / "step-2")
    expected = _state()
    if form == "half precision":
        expected = {name: value.bfloat16() for name, value in expected.items()}
    source = given.resolve(step).source()
    assert source.names() == sorted(expected)
    assert all(torch.equal(source.read(name), expected[name]) for name in expected)
    said = convert(given.resolve(step), tmp_path / "hf", "hf")
    assert "unverified" in said and "unverified" in (tmp_path / "hf" / "README.md").read_text()
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").state_dict()
    assert all(torch.equal(stock[name], expected[name]) for name in expected)


def _renamed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in _state().items()}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "other names": (lambda: _renamed("model.embeddings", "tok_embeddings"), "tok_embeddings"),
    "a part": (lambda: {"lm_head.weight": torch.ones(67, 24)}, "lacks"),
    "another shape": (lambda: {**_state(), "model.norm.weight": torch.ones(5)}, "shape"),
    "twice": (lambda: {**_state(), "_orig_mod.lm_head.weight": torch.ones(67, 24)}, "both lm_head"),
    "training state alone": (lambda: {"optimizer": {"x": torch.ones(1)}}, "lacks"),
    "no tensors": (lambda: {**_state(), "lm_head.weight": 3}, "lacks lm_head"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_such_model_is_refused_in_one_line(
    tmp_path: Path, given: GivenFiles, form: str
) -> None:
    state, message = REFUSED[form]
    step = save_plain(state(), tmp_path / "step-2")
    with pytest.raises(UserError, match=message) as caught:
        load_model(given.resolve(step))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "gone", "no index", "pipe"])
def test_a_damaged_step_is_refused_in_one_line(
    tmp_path: Path, given: GivenFiles, damage: str
) -> None:
    step = save_plain(_state(), tmp_path / "step-2")
    file = next(step.glob("*.distcp"))
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 100)
    elif damage == "no index":
        (step / METADATA).unlink()
    else:
        file.unlink()
        if damage == "pipe":
            os.mkfifo(file)
    with pytest.raises(UserError, match="step-2") as caught:
        load_model(resolve(step, given=given))
    assert "\n" not in str(caught.value)


def test_a_step_of_ours_without_its_hashes_is_no_step_of_another_program(
    tmp_path: Path, given: GivenFiles
) -> None:
    run = write_run(tmp_path / "run", GATED_DELTANET, _state(), step=1)
    write_run(run, GATED_DELTANET, _state(), step=2)
    (run / "checkpoint" / "step-2" / CHECKSUMS).unlink()
    assert resolve(run).step_folder == run / "checkpoint" / "step-1"
    with pytest.raises(UserError, match="half-written or damaged: whole are step-1"):
        resolve(run / "checkpoint" / "step-2")
    shutil.rmtree(run / "checkpoint" / "step-1")
    (run / "recipe.toml").write_text("")
    for name in (run, run / "checkpoint" / "step-2"):
        with pytest.raises(UserError, match="half-written or damaged"):
            resolve(name)


def test_given_files_are_for_models_that_lack_them(tmp_path: Path, given: GivenFiles) -> None:
    state = {name: value for name, value in build(LLAMA).named_parameters()}
    hf = write_hf_folder(tmp_path / "hf", LLAMA, {n: t.detach().clone() for n, t in state.items()})
    with pytest.raises(UserError, match=r"--model-config .* has its own files: leave it out"):
        given.resolve(hf)
    step = save_plain(_state(), tmp_path / "step-1")
    with pytest.raises(UserError, match="holds no tokenizer"):
        GivenFiles(given.model_config, tmp_path).resolve(step)
    with pytest.raises(UserError, match=r"no\.json does not exist"):
        GivenFiles(tmp_path / "no.json").resolve(step)


def test_torchtitan_and_torch_read_ours(
    titan: tuple[Path, dict[str, Tensor]], given: GivenFiles, tmp_path: Path
) -> None:
    convert(given.resolve(titan[0]), tmp_path / "ours", "dcp")
    step = tmp_path / "ours" / "checkpoint" / "step-0"
    assert (step / CHECKSUMS).is_file() and not resolve(tmp_path / "ours").unverified
    for loaded in run_distributed(read_with_titan, 2, tmp_path / "ours", GATED_DELTANET):
        assert all(torch.equal(loaded[name], titan[1][name]) for name in titan[1])
    dcp_to_torch_save(step, tmp_path / "all.pt")
    saved = torch.load(tmp_path / "all.pt", weights_only=True)
    assert all(torch.equal(saved[name], titan[1][name]) for name in titan[1])


def test_adapters_need_a_base_that_has_its_files(tmp_path: Path, assets: Path) -> None:
    from flame.training.job_checks import check_job

    step = save_plain(_state(), tmp_path / "titan" / "checkpoint" / "step-1")
    for rank, message in ((4, "convert it first"), (0, "vocab")):
        job = make_job(assets, tmp_path / "run", model__init=str(step), lora__rank=rank)
        (tmp_path / "config.json").write_text(json.dumps(GATED_DELTANET))
        job.model.config = str(tmp_path / "config.json")
        with pytest.raises(UserError, match=message):
            check_job(job, 1)
