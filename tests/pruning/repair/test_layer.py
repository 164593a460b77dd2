"""Layers trained alone: against plain loops, at every world size, after a kill, reloaded."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from pruning import plan, prune
from pruning.adapters import ADAPTERS
from pruning.calibration.data import calibration_data
from pruning.mixers import find_mixers
from pruning.options import DataOptions
from pruning.planning.new_tensors import made
from pruning.planning.plan_file import read_plan, with_loaded_tensors
from pruning.repair import layer_fit
from pruning.repair.layer_calls import LayerCall, LayerCalls
from pruning.repair.layer_options import LayerOptions
from pruning.repair.local_steps import Steps, batches
from tests.distributed import run_distributed
from tests.pruning.repair.test_repair import (
    SEQUENCES,
    TOKENS,
    complaint,
    data_words,
    home,  # noqa: F401
    pruned,
)

STEPS, BATCH, LR = 4, 2, 0.01
LOCAL = ("--repair-steps", str(STEPS), "--repair-batch", str(BATCH), "--repair-lr", str(LR))
HALF = ("--method", "l1", "--ratio", "0.5")
TRAINED = SEQUENCES - 1


def data_options(home: Path) -> DataOptions:  # noqa: F811
    text, tokenizer = str(home / "text.jsonl"), str(home / "tokenizer")
    return DataOptions(data=text, tokenizer=tokenizer, sequences=SEQUENCES, seq_len=TOKENS)


def in_float64(home: Path, model: str, refitted: Path, **options: Any) -> dict[str, Tensor]:  # noqa: F811
    """The new tensors of local steps that compute in float64, on the plan of a refitted model."""
    reference = resolve(home / model)
    found = layer_fit.with_fitted_layers(
        reference,
        with_loaded_tensors(read_plan(refitted / "plan.json"), refitted),
        calibration_data(reference, data_options(home)),
        LayerOptions(repair_steps=STEPS, repair_batch=BATCH, repair_lr=LR, **options),
        torch.float64,
    )
    return {name: made(tensor) for name, tensor in found.new_tensors.items()}


def runs(home: Path, model: str, dtype: torch.dtype) -> Callable[[Any, int], Any]:  # noqa: F811
    """By a layer's number, a list of what the dense layer is given and gives, a sequence each."""
    dense = load_model(resolve(home / model), dtype).to(dtype)
    loader = calibration_data(resolve(home / model), data_options(home)).loader(0, 1)
    seen: dict[int, list[tuple[Any, Any, Tensor]]] = {}
    for layer, mixer in find_mixers(dense, ADAPTERS[dense.config.model_type]).items():
        mixer.register_forward_hook(
            lambda module, args, kwargs, out, n=layer: seen.setdefault(n, []).append(
                (args, kwargs, output_of(out))
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        for _, (inputs, _labels) in zip(range(SEQUENCES), loader, strict=False):
            dense(inputs["input"], cu_seqlens=inputs["cu_seqlens"], use_cache=False)
    loader.close()
    return seen


def output_of(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def relative_error(mixer: Any, rows: list[tuple[Any, Any, Tensor]]) -> float:
    with torch.no_grad():
        parts = [(output_of(mixer(*args, **kwargs)) - y, y) for args, kwargs, y in rows]
    squares = [
        sum(float(x.double().square().sum()) for x in column) for column in zip(*parts, strict=True)
    ]
    return squares[0] / squares[1]


def plain_steps(mixer: Any, rows: list[tuple[Any, Any, Tensor]]) -> dict[str, Tensor]:
    """Adam by its formulas, on the mean over a batch of errors relative to each dense output.

    Returns the tensors that have the least error on the last sequence; none if no step lowers it.
    """
    parameters = list(mixer.parameters())
    rates = [LR * max(float(p.detach().square().mean() ** 0.5), 1e-3) for p in parameters]
    least, best = relative_error(mixer, rows[TRAINED:]), dict[str, Tensor]()
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    mixer.train()
    for step in range(STEPS):
        loss: Any = 0.0
        for number in range(step * BATCH, (step + 1) * BATCH):
            args, kwargs, y = rows[number % TRAINED]
            off = output_of(mixer(*args, **kwargs)) - y
            loss = loss + off.square().sum() / y.square().sum() / BATCH
        mixer.zero_grad()
        loss.backward()
        factor = min((step + 1) / 10, 1) * (1 + math.cos(math.pi * step / STEPS)) / 2
        with torch.no_grad():
            for p, rate, m, v in zip(parameters, rates, first, second, strict=True):
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                v.mul_(0.99).add_(p.grad.square(), alpha=0.01)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.99 ** (step + 1))
                p -= factor * rate * m_hat / (v_hat.sqrt() + 1e-8)
        if (error := relative_error(mixer, rows[TRAINED:])) < least:
            least = error
            best = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    return best


@pytest.mark.parametrize(
    "model", ["gated_deltanet", pytest.param("delta_net", marks=pytest.mark.slow)]
)
def test_steps_are_plain_ones_at_every_world_size(model: str, home: Path, tmp_path: Path) -> None:  # noqa: F811
    """Steps of float64 agree to 1e-10; those of a user, in float32 here, are held to 1e-6."""
    words = (*HALF, *data_words(home))
    pruned(home / model, tmp_path / "refitted", *words, "--repair", "output")
    rows = runs(home, model, torch.float64)
    expected = load_model(resolve(tmp_path / "refitted"), torch.float64).double()
    names = {module: name for name, module in expected.named_modules()}
    wanted = load_file(tmp_path / "refitted/plan.tensors.safetensors")
    refitted = len(wanted)
    for layer, mixer in find_mixers(expected, ADAPTERS[model]).items():
        best = plain_steps(mixer, rows[layer])
        wanted |= {f"{names[mixer]}.{name}": tensor for name, tensor in best.items()}
    assert len(wanted) > refitted
    found: dict[int, dict[str, Tensor]] = {}
    for world in (1, 2, 4):
        found[world] = run_distributed(in_float64, world, home, model, tmp_path / "refitted")[0]
        torch.testing.assert_close(found[world], wanted, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found[world], found[1], rtol=0, atol=1e-10)
    plans = []
    for world in (1, 2):
        out = tmp_path / f"out-{world}"
        run_distributed(pruned, world, home / model, out, *words, "--repair", "layer", *LOCAL)
        content = json.loads((out / "plan.json").read_text())
        content.pop("replaced")
        plans.append((content, load_file(out / "plan.tensors.safetensors")))
    assert plans[0][0] == plans[1][0]
    torch.testing.assert_close(plans[0][1], plans[1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gated_deltanet", "--method l1 --ratio 0.5 --allocate layer"),
        ("gated_deltanet", "--method random --space value,head --ratio 0.5"),
        ("olmo_hybrid", "--method random --ratio 0.5"),
    ],
)
def test_what_a_user_loads_has_the_error_that_was_reported(
    model: str,
    words: str,
    home: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local = ("--repair", "layer", "--repair-steps", "8", "--repair-memory", "0")
    pruned(home / model, tmp_path / "out", *words.split(), *local, *data_words(home))
    said = re.findall(r"layer (\d+): error on held-out sequences (\S+) -> (\S+)", _out(capsys))
    rows = runs(home, model, torch.float32)
    loaded = load_model(resolve(tmp_path / "out"))
    mixers = find_mixers(loaded, ADAPTERS[loaded.config.model_type])
    assert [int(layer) for layer, _, _ in said] == list(mixers)
    for layer, before, after in said:
        error = relative_error(mixers[int(layer)], rows[int(layer)][TRAINED:])
        assert float(after) == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert float(after) <= float(before)


def _out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_steps_that_do_not_help_are_not_kept(home: Path, tmp_path: Path) -> None:  # noqa: F811
    words = (*HALF, *data_words(home))
    pruned(home / "delta_net", tmp_path / "output", *words, "--repair", "output")
    steps = ("--repair-steps", "2", "--repair-lr", "1")
    pruned(home / "delta_net", tmp_path / "layer", *words, "--repair", "layer", *steps)
    one, other = (load_file(tmp_path / n / "plan.tensors.safetensors") for n in ("output", "layer"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    content = json.loads((tmp_path / "layer/plan.json").read_text())
    assert content["repair"]["kind"] == "layer" and content["repair"]["layers"] == []


def killed(home: Path, out: Path, folder: Path) -> None:  # noqa: F811
    """A repair that dies in its second layer."""
    fitted, fit = [], layer_fit.fit

    def dying(*arguments: Any) -> Any:
        if fitted:
            raise KeyboardInterrupt
        fitted.append(fit(*arguments))
        return fitted[0]

    layer_fit.fit = dying
    with pytest.raises(KeyboardInterrupt):
        pruned(home / "gated_deltanet", out, *local_words(home, folder))
    layer_fit.fit = fit


def local_words(home: Path, folder: Path) -> list[str]:  # noqa: F811
    return [*HALF, *data_words(home), *LOCAL, "--repair", "layer", "--repair-folder", str(folder)]


def test_a_killed_repair_goes_on_with_the_next_layer(
    home: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, folder = home / "gated_deltanet", tmp_path / "layers"
    run_distributed(killed, 2, home, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()
    left = {"layer-0.json", "layer-0.safetensors"}
    assert {path.name for path in folder.iterdir()} == left
    other = local_words(home, folder)
    other[other.index("--ratio") + 1] = "0.25"
    text = complaint(prune, model, tmp_path / "out", *other)
    assert "holds layers of a repair of another model, plan, data or options" in text
    pruned(model, tmp_path / "out", *local_words(home, folder))
    assert "repair: 1 layers in" in capsys.readouterr().out
    pruned(model, tmp_path / "whole", *local_words(home, tmp_path / "others"))
    resumed, whole = (
        load_file(tmp_path / name / "plan.tensors.safetensors") for name in ("out", "whole")
    )
    torch.testing.assert_close(resumed, whole, rtol=1e-6, atol=1e-6)


def test_states_beyond_the_bound_are_on_disk(tmp_path: Path) -> None:
    calls, size = LayerCalls(bound=1000, folder=tmp_path), 4 * 100
    given = [torch.randn(1, 10, 5) for _ in range(8)]
    for number, x in enumerate(given):
        calls.put(number % 2, number, LayerCall((), {"x": x, "mask": None, "n": 3}, 2 * x))
        assert calls.in_memory <= calls.bound
    assert calls.in_memory == 2 * size and calls.written == 6 * size
    assert len(list(tmp_path.iterdir())) == 6
    for number, x in enumerate(given):
        found = calls.get(number % 2, number)
        assert found is not None and torch.equal(found.kwargs["x"], x)
        assert torch.equal(found.output, 2 * x) and found.kwargs["n"] == 3
    assert calls.get(0, 1) is None
    calls.drop(0)
    calls.drop(1)
    assert calls.in_memory == 0 and not list(tmp_path.iterdir())


def test_batches_are_spread_over_the_processes_and_take_every_sequence() -> None:
    how = Steps(steps=1, lr=1, batch=4, train=30, sequences=32, shards=8, seed=3)
    drawn = [sequences for _, sequences in zip(range(15), batches(how), strict=False)]
    flat = [sequence for batch in drawn for sequence in batch]
    assert sorted(flat[:30]) == sorted(flat[30:60]) == list(range(30))
    assert flat[:30] != flat[30:60]
    whole = [batch for batch in drawn[:7]]
    for world in (2, 4):
        for batch in whole:
            counts = [sum(s % world == rank for s in batch) for rank in range(world)]
            assert max(counts) == 4 // world


def test_local_steps_that_cannot_be_taken_are_refused(home: Path, tmp_path: Path) -> None:  # noqa: F811
    model, out = home / "delta_net", tmp_path / "out"
    layer = (*HALF, "--repair", "layer")
    text = complaint(prune, model, out, *layer)
    assert "has no recipe that names its training data: give --data" in text
    text = complaint(prune, model, out, *layer, "--repair-steps", "0")
    assert "--repair-steps: 0 is not a" in text
    text = complaint(prune, model, out, *layer, "--repair-heldout", "1.5")
    assert "--repair-heldout: 1.5 is not a number between 0 and 1" in text
    text = complaint(prune, model, out, *layer, "--sequences", "1")
    assert "of --sequences 1 leaves none to train on" in text
    text = complaint(prune, model, out, *HALF, "--repair-steps", "9")
    assert text.endswith("--repair-steps is for --repair layer: give it, or leave it out")
    text = complaint(plan, model, tmp_path / "plan.json", *layer)
    assert text == "--repair layer trains layers on data: slimstate prune does that"
