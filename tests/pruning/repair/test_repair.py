"""Repaired plans: what they hold at every world size, in every kind of space, after a kill."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from pruning import apply, calibrate, plan, prune
from pruning.adapters import ADAPTERS
from pruning.calibration.data import calibration_data
from pruning.calibration.stats_file import read_meta
from pruning.mixers import find_mixers, output_projection
from pruning.options import DataOptions
from tests.distributed import run_distributed
from tests.pruning.hybrids import CONFIGS as HYBRIDS
from tests.pruning.models import (
    DELTA_NET,
    GATED_DELTANET,
    tensors_in,
    weights,
    write_hf,
    write_run,
    write_text,
)
from tests.pruning.stages import pruned, stage

SEQUENCES, TOKENS = 6, 80
MODELS = {
    "gated_deltanet": GATED_DELTANET,
    "delta_net": DELTA_NET,
    "olmo_hybrid": HYBRIDS["olmo_hybrid"] | {"vocab_size": 300},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    write_text(folder)
    for name, config in MODELS.items():
        write_hf(folder / name, config, weights(config))
    return folder


def data_words(home: Path) -> list[str]:
    values = {"data": home / "text.jsonl", "tokenizer": home / "tokenizer"}
    sizes = {"sequences": SEQUENCES, "seq-len": TOKENS}
    return [w for key, value in (values | sizes).items() for w in (f"--{key}", str(value))]


def calibrated(*arguments: Any) -> None:
    stage(calibrate, *arguments)


def complaint(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        stage(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected_projections(home: Path, model: str, out: Path) -> dict[str, Tensor]:
    """By layer, the ridge regression on a pruned model as written, without any of our sums."""
    dense, slim = (load_model(resolve(path)) for path in (home / model, out))
    options = DataOptions(
        data=str(home / "text.jsonl"),
        tokenizer=str(home / "tokenizer"),
        sequences=SEQUENCES,
        seq_len=TOKENS,
    )
    loader = calibration_data(resolve(home / model), options).loader(0, 1)
    ours = find_mixers(slim, ADAPTERS[slim.config.model_type])
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def compare(layer: int, mixer: Any, args: tuple, kwargs: dict) -> None:
        found: list[Tensor] = []
        for each, run in ((ours[layer], ours[layer].forward), (mixer, mixer.forward)):
            hook = output_projection(each).register_forward_pre_hook(
                lambda module, given: found.append(given[0].flatten(0, -2).double())
            )
            run(*args, **kwargs)
            hook.remove()
        rows.setdefault(layer, []).append((found[1], found[0]))

    for layer, mixer in find_mixers(dense, ADAPTERS[dense.config.model_type]).items():
        mixer.register_forward_pre_hook(
            lambda module, args, kwargs, n=layer: compare(n, module, args, kwargs),
            with_kwargs=True,
        )
    with torch.no_grad():
        for _, (inputs, _labels) in zip(range(SEQUENCES), loader, strict=False):
            dense(inputs["input"], cu_seqlens=inputs["cu_seqlens"], use_cache=False)
    loader.close()
    return {
        _name(slim, ours[layer]): _ridge(
            output_projection(find_mixers(dense, ADAPTERS[dense.config.model_type])[layer]),
            output_projection(ours[layer]),
            *(torch.cat(part) for part in zip(*pairs, strict=True)),
        )
        for layer, pairs in rows.items()
    }


def _name(model: Any, mixer: Any) -> str:
    wanted = output_projection(mixer)
    return next(f"{name}.weight" for name, m in model.named_modules() if m is wanted)


def _ridge(dense: Any, left: Any, z: Tensor, pruned: Tensor) -> Tensor:
    w0, w1 = (module.weight.detach().double() for module in (dense, left))
    root = (0.01 * pruned.square().mean() * len(pruned)).sqrt()
    design = torch.cat([pruned, root * torch.eye(pruned.shape[1]).double()])
    wanted = torch.cat([z @ w0.T, root * w1.T])
    return torch.from_numpy(np.linalg.lstsq(design.numpy(), wanted.numpy(), rcond=None)[0].T)


@pytest.mark.parametrize("model", ["gated_deltanet", "delta_net"])
def test_repaired_plans_are_the_same_at_every_world_size(
    model: str, home: Path, tmp_path: Path
) -> None:
    """The stages one by one; and `prune` does the same in one."""
    choice = ("--method", "output-error", "--ratio", "0.5")
    data, stats, first = data_words(home), tmp_path / "stats", tmp_path / "plan.json"
    calibrated(home / model, stats, "--methods", "output-error", *data)
    stage(plan, home / model, first, "--stats", stats, *choice)
    stage(apply, home / model, first, tmp_path / "plain")
    found, texts = {}, []
    for world in (1, 2, 4):
        sums, file = tmp_path / f"sums-{world}", tmp_path / f"repaired-{world}.json"
        run_distributed(calibrated, world, home / model, sums, "--plan", first, *data)
        repair = ("--repair", "output", "--repair-stats", sums)
        stage(plan, home / model, file, "--stats", stats, *choice, *repair)
        found[world] = load_file(tmp_path / f"repaired-{world}.tensors.safetensors")
        content = json.loads(file.read_text())
        assert content.pop("replaced")["hash"]
        texts.append(content)
    assert texts[0] == texts[1] == texts[2]
    assert texts[0]["repair"]["calibration"]["tokens"] == SEQUENCES * TOKENS
    for other in (found[2], found[4]):
        torch.testing.assert_close(other, found[1], rtol=1e-10, atol=1e-10)
    expected = expected_projections(home, model, tmp_path / "plain")
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-6)
    run_distributed(pruned, 2, home / model, tmp_path / "out", *choice, "--repair", "output", *data)
    content = json.loads((tmp_path / "out/plan.json").read_text())
    content.pop("replaced")
    assert content == texts[0]
    written = load_file(tmp_path / "out/plan.tensors.safetensors")
    torch.testing.assert_close(written, found[1], rtol=1e-10, atol=1e-10)
    loaded = tensors_in(resolve(tmp_path / "out").source())
    for name, tensor in written.items():
        assert torch.equal(loaded[name], tensor.float())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gated_deltanet", "--method random --space value --ratio 0.5"),
        ("gated_deltanet", "--method random --space key,head --ratio 0.5"),
        ("gated_deltanet", "--method l1 --ratio 0.5 --allocate model"),
        ("gated_deltanet", "--method l1 --ratio 0.5 --allocate layer --pad"),
        ("gated_deltanet", "--method l1 --ratio 0.5 --paper"),
        ("delta_net", "--method pca --ratio 0.5"),
        ("olmo_hybrid", "--method random --ratio 0.5"),
    ],
)
def test_what_a_user_loads_is_the_regression_in_every_kind_of_space(
    model: str, words: str, home: Path, tmp_path: Path
) -> None:
    choice = (*words.split(), *data_words(home)) if "pca" in words else tuple(words.split())
    pruned(home / model, tmp_path / "plain", *choice)
    repair = ("--repair", "output", *data_words(home))
    pruned(home / model, tmp_path / "out", *words.split(), *repair)
    expected = expected_projections(home, model, tmp_path / "plain")
    plain, found = (tensors_in(resolve(tmp_path / name).source()) for name in ("plain", "out"))
    for name, tensor in found.items():
        if name in expected:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5)
            assert not torch.equal(tensor, plain[name])
        else:
            assert torch.equal(tensor, plain[name])


def test_without_a_method_the_best_proven_one_is_taken_and_said(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--ratio", "0.5", *data_words(home))
    pairs = {
        ("--gain", "undo"): ("--method", "output-error", "--repair", "output", "--gain", "undo"),
        ("--paper",): ("--method", "drrqr", "--repair", "none", "--paper"),
        ("--repair", "none"): ("--method", "output-error", "--gain", "measured"),
    }
    for number, (left, said) in enumerate(pairs.items()):
        plans = []
        for name, choice in ((f"left-{number}", left), (f"said-{number}", said)):
            pruned(home / "delta_net", tmp_path / name, *words, *choice)
            plans.append((tmp_path / name / "plan.json").read_bytes())
        assert plans[0] == plans[1]
    found = capsys.readouterr().out
    costs = "33 runs of each head's delta rule on 480 of them (--replay-fraction F: on another"
    default = "output-error chooses, refits the output projections (--repair output); two passes"
    assert found.count("no --method is named") == 2
    assert f"no --method is named: {default} over 480 tokens, {costs}" in found
    assert found.count("Closer still, and slower: --method taylor --repair layer") == 1


def test_moments_of_refitted_tensors_begin_anew(home: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", GATED_DELTANET, weights(GATED_DELTANET))
    choice = ("--method", "l1", "--ratio", "0.5", "--repair", "output")
    pruned(tmp_path / "run", tmp_path / "out", *choice, *data_words(home))
    from flame.checkpoint.dcp_source import DcpSource

    step = DcpSource(tmp_path / "out/checkpoint/step-7", True)
    for name in ("o_proj", "q_proj"):
        entry = f"optimizer.state.model.layers.0.attn.{name}.weight"
        moments = [step.read(f"{entry}.{m}") for m in ("exp_avg", "exp_avg_sq", "step")]
        assert all(bool((m == 0).all()) == (name == "o_proj") for m in moments)
    notes = json.loads((tmp_path / "out/plan.json").read_text())["notes"]
    assert any("of 2 layers are fitted anew, so their optimizer moments begin" in n for n in notes)


def killed(home: Path, plan_file: Path, out: Path) -> None:
    """A repair's calibration that dies in its fifth round on two processes."""
    from pruning.calibration import collect

    ran, run = 0, collect.run_batch

    def dying(*arguments: Any) -> None:
        nonlocal ran
        ran += 1
        if ran > 5:
            raise KeyboardInterrupt
        run(*arguments)

    collect.run_batch = dying
    words = [*data_words(home)[:-4], "--sequences", "18", "--seq-len", "40", "--save-every", "4"]
    with pytest.raises(KeyboardInterrupt):
        calibrated(home / "delta_net", out, "--plan", plan_file, *words)
    collect.run_batch = run


def test_a_killed_repair_resumes_at_another_world_size(home: Path, tmp_path: Path) -> None:
    model, file = home / "delta_net", tmp_path / "plan.json"
    stage(plan, model, file, "--method", "l1", "--ratio", "0.5")
    words = [*data_words(home)[:-4], "--sequences", "18", "--seq-len", "40"]
    run_distributed(killed, 2, home, file, tmp_path / "sums")
    assert (read_meta(tmp_path / "sums").sequences) == 8
    stage(plan, model, tmp_path / "other.json", "--method", "l2", "--ratio", "0.5")
    other = ("--resume", "--plan", tmp_path / "other.json", *words)
    assert "was begun with plan" in complaint(calibrate, model, tmp_path / "sums", *other)
    again = ("--resume", "--plan", file, *words)
    run_distributed(calibrated, 4, model, tmp_path / "sums", *again)
    calibrated(model, tmp_path / "whole", "--plan", file, *words)
    resumed, whole = (load_file(tmp_path / n / "statistics.safetensors") for n in ("sums", "whole"))
    torch.testing.assert_close(resumed, whole, rtol=1e-10, atol=1e-10)


def test_repairs_that_cannot_be_made_are_refused(home: Path, tmp_path: Path) -> None:
    model, file, choice = home / "delta_net", tmp_path / "plan.json", ("--method", "l1", "--ratio")
    text = complaint(plan, model, file, *choice, "0.5", "--repair", "output")
    assert "--repair output reads data: plan without it, then make its sums with slimst" in text
    text = complaint(plan, model, file, *choice, "0.5", "--repair-stats", tmp_path)
    assert text.endswith("is for a repair: give --repair output too")
    text = complaint(prune, model, tmp_path / "out", *choice, "0.5", "--repair", "output")
    assert text.endswith("has no recipe that names its training data: give --data or --recipe")
    text = complaint(prune, model, tmp_path / "out", *choice, "0.5", "--repair", "layers")
    assert "--repair" in text and "layers" in text
    stage(plan, model, file, *choice, "0.5")
    text = complaint(calibrate, model, tmp_path / "s", "--plan", file, "--methods", "l1")
    assert text.endswith("--plan for what was chosen: give one")
    sums = ("--plan", file, *data_words(home))
    assert "is of another model" in complaint(
        calibrate, home / "gated_deltanet", tmp_path / "s", *sums
    )
    calibrated(model, tmp_path / "s", *sums)
    repair = ("--repair", "output", "--repair-stats", tmp_path / "s", "--overwrite")
    text = complaint(plan, model, file, *choice, "0.25", *repair)
    assert "has the sums of another plan's layers" in text
    stage(plan, model, tmp_path / "fits.json", *choice, "0.5", *repair[:-1])
    text = complaint(apply, model, tmp_path / "fits.json", tmp_path / "out", "--pad")
    assert "has tensors of its own, which --pad cannot fill up" in text
    stats = tmp_path / "stats"
    calibrated(model, stats, "--methods", "drrqr", *data_words(home))
    repair = ("--repair", "output", "--repair-stats", stats, "--overwrite")
    text = complaint(plan, model, file, *choice, "0.5", *repair)
    assert text.startswith("--repair output needs OutputEquations")
    fraction = ("--replay-fraction", "0")
    text = complaint(calibrate, model, tmp_path / "t", *fraction, *data_words(home))
    assert "--replay-fraction: 0 is not a number above 0, at most 1" in text
