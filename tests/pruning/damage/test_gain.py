"""`--gain measured`: models whose gain is to be kept or undone; the choice at every world size."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.process.distributed import data_parallel_mesh, process_group
from launch import sweep
from pruning import plan
from pruning.adapters import adapter_for
from pruning.calibration.data import calibration_data
from pruning.damage.applied import pruned_model
from pruning.planning.plan_file import read_plan, with_loaded_tensors
from tests.distributed import run_distributed
from tests.pruning import families, hybrids
from tests.pruning.damage.heldout import HELDOUT, SEQUENCES, options_of
from tests.pruning.damage.heldout import words as words_of
from tests.pruning.models import GATED_DELTANET, tensors_in, weights, write_hf, write_text
from tests.pruning.stages import pruned, stage

CONFIG = GATED_DELTANET | {"norm_eps": 1e-3}
"""Outputs lie near such an eps, which takes the gain of none of them back."""
FAMILIES = {
    name: config
    for name, config in (families.CONFIGS | hybrids.CONFIGS).items()
    if name in {"gated_deltaproduct", "kda", "qwen3_next", "qwen3_5_text", "olmo_hybrid"}
}
CHOICE = ("--method", "l1", "--ratio", "0.5", "--heldout-sequences", str(HELDOUT))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gain")
    write_text(folder)
    for name in ("undo", "keep"):
        write_hf(folder / name, CONFIG, constructed(name))
    return folder


def constructed(wins: str) -> dict[str, Tensor]:
    """A model whose last 16 of 32 key channels are the ones that `l1` drops.

    `undo`: they repeat the others, so that q·k, and with it what zeros give, is that of the dense
    model. `keep`: they repeat 8 of the others, and the queries lie mostly in 8 that no key uses.
    Then |k| loses a factor of sqrt(2) and |q| nothing, so that q·k without them is sqrt(1/2) of
    what it was.
    """
    tensors, heads, width = weights(CONFIG), CONFIG["num_heads"], CONFIG["head_dim"]
    for layer, x in itertools.product(range(CONFIG["num_hidden_layers"]), "qk"):
        names = (f"model.layers.{layer}.attn.{x}_{part}.weight" for part in ("proj", "conv1d"))
        rows, kernels = (tensors[n].view(heads, width, *tensors[n].shape[1:]) for n in names)
        repeated = 16 if wins == "undo" else 8
        rows[:, 16:] = 0
        rows[:, 16 : 16 + repeated] = rows[:, :repeated] / 4
        kernels[:, 16 : 16 + repeated] = kernels[:, :repeated] * 4
        if wins == "keep":
            rows[:, 8:16] *= 0 if x == "k" else 1
            kernels[:, 8:16] *= 20
    return tensors


def divergence(home: Path, dense: nn.Module, other: nn.Module) -> float:
    """KL(dense ‖ other) on the rows after a calibration, in float64."""
    loader = calibration_data(resolve(home / "undo"), options_of(home)).loader(0, 1)
    total, count = 0.0, 0
    for inputs, labels in itertools.islice(loader, SEQUENCES, SEQUENCES + HELDOUT):
        given: dict[str, Any] = dict(inputs)
        tokens, at = given.pop("input"), labels[0] != -100
        with torch.no_grad():
            p, q = (
                m.double()(tokens, use_cache=False, **given).logits[0, at].log_softmax(-1)
                for m in (dense, other)
            )
        total += float((p.exp() * (p - q)).sum())
        count += int(at.sum())
    loader.close()
    return total / count


@pytest.mark.parametrize("wins", ["undo", "keep"])
def test_what_is_closer_to_the_dense_model_is_taken_by_a_plain_computation_too(
    wins: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned(home / wins, tmp_path / "out", *CHOICE, "--gain", "measured", *words_of(home))
    said = capsys.readouterr().out
    name, *shown = re.search(
        r"--gain measured: (\w+): (\S+) nats .* on 5 held-out sequences, (\w+) (\S+);", said
    ).groups()  # type: ignore[union-attr]
    dense, found = load_model(resolve(home / wins)), {}
    for gain in ("undo", "keep"):
        pruned(home / wins, tmp_path / gain, *CHOICE, "--gain", gain)
        other = load_model(resolve(tmp_path / gain))
        found["undone" if gain == "undo" else "kept"] = divergence(home, dense, other)
    assert name == {"undo": "undone", "keep": "kept"}[wins] == min(found, key=lambda n: found[n])
    assert float(shown[0]) == pytest.approx(found[name], rel=0.01)
    assert float(shown[2]) == pytest.approx(found[shown[1]], rel=0.01)
    assert 4 * float(shown[0]) < float(shown[2])
    written, same = (tensors_in(resolve(tmp_path / out).source()) for out in ("out", wins))
    assert all(torch.equal(written[name], same[name]) for name in same)
    assert resolve(tmp_path / "out").config == resolve(tmp_path / wins).config
    content = read_plan(tmp_path / "out/plan.json")
    assert content.undo_gain is (wins == "undo") and content.budget["gain"] == "measured"
    assert any("outputs by 1.41: this is kept" in n for n in content.notes) is (wins == "keep")
    [note] = [note for note in content.notes if note.startswith("--gain measured: ")]
    figures = [float(x) for x in re.findall(r"\d[\d.e-]*", note)]
    assert figures == [float(f"{float(x):.2g}") for x in (shown[0], shown[2])]


@pytest.mark.slow
@pytest.mark.parametrize("wins", ["undo", "keep"])
def test_plans_are_the_same_at_every_world_size(wins: str, home: Path, tmp_path: Path) -> None:
    """With what `prune` does where no method is named: the repair is measured too."""
    choice = ("--ratio", "0.5", "--heldout-sequences", HELDOUT, *words_of(home))
    texts = []
    for world in (1, 2, 4):
        run_distributed(pruned, world, home / wins, tmp_path / f"{world}", *choice)
        content = json.loads((tmp_path / f"{world}/plan.json").read_text())
        texts.append({**content, "replaced": content["replaced"] is None})
    assert texts[0] == texts[1] == texts[2]
    notes = texts[0]["notes"]
    assert sum(note.startswith("--gain measured: ") for note in notes) == 1
    [repair] = [note for note in notes if note.startswith("--repair output is ")]
    assert ("is taken" in repair) == (texts[0]["repair"] is not None) != texts[0]["replaced"]
    with_it, without = (float(x) for x in re.findall(r"\d[\d.e-]*", repair))
    assert (with_it <= without) if "is taken" in repair else (with_it >= without)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured(name: str, home: Path, tmp_path: Path) -> None:
    """Where a config has no eps to undo the gain by, there is nothing to choose."""
    config = FAMILIES[name] | {"vocab_size": 300}
    write_hf(tmp_path / "model", config, weights(config))
    choice = (*CHOICE, "--gain", "measured", *words_of(home))
    pruned(tmp_path / "model", tmp_path / "out", *choice)
    found = read_plan(tmp_path / "out/plan.json")
    said = [note for note in found.notes if note.startswith("--gain measured: ")]
    assert len(said) == int(adapter_for(config).can_undo_gain)
    assert found.undo_gain is any("measured: undone" in note for note in said)


@pytest.mark.parametrize(
    "words",
    [
        "--gain keep",
        "--gain undo --space value",
        "--gain keep --space key,value",
        "--gain keep --allocate model",
        "--gain undo --allocate model --pad",
        "--gain keep --repair output",
    ],
)
def test_what_is_measured_is_what_a_user_loads(words: str, home: Path, tmp_path: Path) -> None:
    data = words_of(home) if "repair" in words else []
    pruned(home / "undo", tmp_path / "out", *CHOICE[:4], *words.split(), *data)
    found = with_loaded_tensors(read_plan(tmp_path / "out/plan.json"), tmp_path / "out")
    assert found.undo_gain is ("undo" in words)
    loaded = load_model(resolve(tmp_path / "out")).state_dict()
    with process_group():
        mesh = data_parallel_mesh()
        model = pruned_model(resolve(home / "undo"), found, mesh, torch.float32)
        assert (
            model.config.to_dict().get("norm_eps") == resolve(tmp_path / "out").config["norm_eps"]
        )
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(whole, loaded[name]), name


def test_a_kept_gain_is_that_of_masked_channels_under_a_smaller_eps(
    home: Path, tmp_path: Path
) -> None:
    """What is sliced and loaded gives sqrt(d / d') times what zeros give to the output norm."""
    pruned(home / "keep", tmp_path / "out", *CHOICE[:4], "--gain", "keep")
    sliced, masked = load_model(resolve(tmp_path / "out")), load_model(resolve(home / "keep"))
    for layer in masked.model.layers:
        layer.attn.o_norm.eps /= 2
        for x in "qk":
            rows = getattr(layer.attn, f"{x}_proj").weight.data
            rows.view(CONFIG["num_heads"], CONFIG["head_dim"], -1)[:, 16:] = 0
    assert divergence(home, masked, sliced) < 1e-12
    undone = load_model(resolve(home / "keep"))
    assert divergence(home, undone, sliced) > 1e-5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gain", "both"], "--gain: unknown 'both': choose from undo, keep, measured"),
        (["--gain", "undo", "--paper"], "--paper means --gain keep, not undo: leave one out"),
        (["--gain", "measured"], "has no recipe that names its training data: give --data"),
        (["--gain", "keep", "--allocate", "auto"], "and --gain keep leaves it: leave one out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    flags: list[str], message: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        pruned(home / "undo", tmp_path / "out", *CHOICE, *flags)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_where_there_is_too_little_text_the_message_says_what_needs_none(
    home: Path, tmp_path: Path
) -> None:
    measured = ("--ratio", "0.5", "--gain", "measured")
    with pytest.raises(UserError, match=r"after them for --gain measured \(--gain undo needs none"):
        pruned(home / "undo", tmp_path / "out", *CHOICE[:2], *measured, *words_of(home),
               "--heldout-sequences", 100000)  # fmt: skip
    with pytest.raises(UserError, match="and plan reads none: use slimstate prune"):
        stage(plan, home / "undo", tmp_path / "p", *CHOICE[:2], *measured)
    words = ("--methods", "l1:gain=measured", "--ratios", "0.5", "--heldout", home / "text.jsonl")
    with pytest.raises(UserError, match="sweep undo and keep, or use slimstate prune"):
        options = sweep.STAGE.parse([str(w) for w in (home / "undo", tmp_path / "s", *words)])
        sweep.check(options, 1)
    assert list(tmp_path.iterdir()) == []
