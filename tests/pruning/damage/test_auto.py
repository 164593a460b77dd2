"""`--allocate auto`: masks, their measured damage, and the choice at every world size."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flame.checkpoint.load import build_sharded, load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.process.distributed import data_parallel_mesh, process_group
from pruning import calibrate, plan
from pruning.adapters import adapter_for
from pruning.calibration.data import calibration_data
from pruning.damage.masking import masked
from pruning.damage.meter import Damage, DamageMeter, least
from pruning.planning.plan_file import read_plan
from pruning.spaces import Kept
from tests.distributed import run_distributed
from tests.pruning.damage.heldout import HELDOUT, SEQUENCES, options_of, words
from tests.pruning.masking import mask
from tests.pruning.models import DELTA_NET, GATED_DELTANET, weights, write_hf, write_text
from tests.pruning.stages import pruned, stage

MODELS = {"gated_deltanet": GATED_DELTANET, "delta_net": DELTA_NET}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of which one layer's output matters far more than the other's."""
    folder = tmp_path_factory.mktemp("auto")
    write_text(folder)
    for name, config in MODELS.items():
        tensors = weights(config)
        tensors["model.layers.0.attn.o_proj.weight"] *= 0.1
        write_hf(folder / name, config, tensors)
    return folder


def selections(config: dict[str, Any]) -> list[dict[str, Kept]]:
    """Key channels of one layer alone; all kinds of all layers together; nothing."""
    spaces = adapter_for(config).spaces(config)
    halves = {
        space.name: tuple(
            torch.arange(head % 2, space.head_dim, 2) for head in range(space.num_heads)
        )
        for space in spaces
    }
    first = next(space.name for space in spaces if space.kind == "key")
    return [{first: halves[first]}, halves, {}]


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    given: dict[str, Any] = dict(inputs)
    with torch.no_grad():
        found: Tensor = model(given.pop("input"), use_cache=False, **given).logits
    return found


def measured(home: Path, name: str) -> tuple[list[Damage], bool]:
    """What one process of a job finds, and whether its weights are afterwards what they were."""
    reference = resolve(home / name)
    with process_group():
        meter = DamageMeter(reference, calibration_data(reference, options_of(home)), HELDOUT)
        found = meter.damages(selections(reference.config))
        fresh = build_sharded(reference, data_parallel_mesh())
        weights = (dict(model.named_parameters()) for model in (fresh, meter.model))
        before, after = (
            {n: _local(p) for n, p in each.items() if ".attn." in n} for each in weights
        )
    return found, before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter, whether FSDP2 has sharded it or not."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@pytest.mark.parametrize("name", MODELS)
def test_damage_is_that_of_a_masked_copy_on_the_rows_after_calibration(
    name: str, home: Path
) -> None:
    reference = resolve(home / name)
    loader = calibration_data(reference, options_of(home)).loader(0, 1)
    rows = list(itertools.islice(loader, SEQUENCES + HELDOUT))[SEQUENCES:]
    loader.close()
    dense, expected = load_model(reference), []
    spaces = adapter_for(reference.config).spaces(reference.config)
    for kept in selections(reference.config):
        copy, sums = load_model(reference), torch.zeros(3, dtype=torch.float64)
        mask(copy, [space for space in spaces if space.name in kept], kept)
        for inputs, labels in rows:
            at = labels[0] != -100
            p, q = (logits(m, inputs)[0, at].double().log_softmax(-1) for m in (dense, copy))
            rise = torch.nn.functional.nll_loss(q - p, labels[0, at], reduction="sum")
            sums += torch.stack([(p.exp() * (p - q)).sum(), rise, at.sum()])
        expected.append((sums[:2] / sums[2]).tolist())
    found = {}
    for world in (1, 2, 4):
        outcomes = run_distributed(measured, world, home, name)
        assert all(same for _, same in outcomes)
        found[world] = outcomes[0][0]
        assert all(damages == found[world] for damages, _ in outcomes)
    assert found[1] == found[2] == found[4]
    for damage, of_copy in zip(found[1], expected, strict=True):
        assert [damage.kl, damage.loss] == pytest.approx(of_copy, rel=1e-3, abs=1e-6)
    assert found[1][1].kl > found[1][0].kl > 0 == found[1][2].kl


def test_a_masked_model_is_whole_again_after_an_error(home: Path) -> None:
    reference = resolve(home / "gated_deltanet")
    model = load_model(reference)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spaces = adapter_for(reference.config).spaces(reference.config)
    everything = selections(reference.config)[1]
    with pytest.raises(KeyError), masked(model, spaces, everything):
        assert not torch.equal(
            model.state_dict()["model.layers.1.attn.q_proj.weight"],
            before["model.layers.1.attn.q_proj.weight"],
        )
        raise KeyError
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param("gated_deltanet", "output-error", marks=pytest.mark.slow),
        ("delta_net", "taylor"),
    ],
)
def test_the_plan_is_the_same_at_every_world_size_and_the_least_harmful(
    name: str, method: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = ("--method", method, "--ratio", "0.5", "--allocate", "auto", *words(home))
    choice = (*choice, "--heldout-sequences", HELDOUT)
    pruned(home / name, tmp_path / "1", *choice)
    said = capsys.readouterr().out
    for world in (2, 4):
        run_distributed(pruned, world, home / name, tmp_path / f"{world}", *choice)
    texts = [(tmp_path / f"{world}" / "plan.json").read_bytes() for world in (1, 2, 4)]
    assert texts[0] == texts[1] == texts[2]
    figures = {
        line.split(": ")[1]: float(line.split("KL ")[1].split(",")[0])
        for line in said.splitlines()
        if line.startswith("--allocate auto: ") and "KL " in line
    }
    same = dict(re.findall("--allocate auto: (\\w+): the same channels as (\\w+)", said))
    assert figures.keys() | same.keys() == {"uniform", "layer", "model", "measured"}
    assert not figures.keys() & same.keys() and set(same.values()) <= figures.keys()
    [taken] = [line.split(": ")[1] for line in said.splitlines() if line.endswith(", taken")]
    assert figures[taken] == min(figures.values())
    found = read_plan(tmp_path / "1" / "plan.json")
    assert found.budget["allocate"] == "auto"
    [note] = [note for note in found.notes if note.startswith("--allocate auto took")]
    assert note.startswith(f"--allocate auto took {taken} over ")
    assert note.endswith(
        "--pad makes a stock model of them, and --allocate uniform one without zeros"
    )
    assert taken != "uniform" and found.config_after["model_type"].startswith("slim_")
    heads = sum(len(row) for row in found.widths.values())
    assert sum(sum(row) for row in found.widths.values()) == heads * 16


def test_where_the_layers_matter_alike_uniform_widths_stay(home: Path) -> None:
    alike = [Damage(0.10004, 0.2), Damage(0.10001, 0.1), Damage(0.2, 0)]
    assert least(alike) == 0
    assert least([*alike, Damage(0.0998, 1)]) == 3


def test_saved_statistics_and_padding_serve_as_well(home: Path, tmp_path: Path) -> None:
    choice = ("--method", "output-error", "--ratio", "0.5", "--allocate", "auto")
    few = ("--heldout-sequences", 2, *words(home))
    choice = (*choice, "--floor", 12)
    stage(calibrate, home / "delta_net", tmp_path / "stats", *words(home))
    stats = ("--stats", tmp_path / "stats")
    pruned(home / "delta_net", tmp_path / "one", *choice, *few)
    pruned(home / "delta_net", tmp_path / "two", *choice, *few, *stats, "--pad")
    one, two = (read_plan(tmp_path / out / "plan.json") for out in ("one", "two"))
    assert one.widths == two.widths and two.pad
    assert min(width for row in one.widths.values() for width in row) >= 12
    assert two.config_after["model_type"] == "delta_net"
    assert any("filled up with zeros, its state is as large" in note for note in two.notes)
    with pytest.raises(UserError, match="was made with sequences 6, not 7: give the same options"):
        pruned(home / "delta_net", tmp_path / "x", *choice, *few, *stats, "--sequences", "7")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "l1"], "has no recipe that names its training data: give --data"),
        (["--method", "drrqr"], "shares channels by scores, which drrqr has none of"),
        (["--method", "l1", "--paper"], "--allocate auto measures models whose gain is undone"),
        (["--method", "pca"], "zeros in channels, and pca mixes channels: use --allocate model"),
        (["--method", "l1", "--heldout-sequences", "0"], "0 is not a whole number of at least 1"),
        (["--method", "l1", "--floor", "17"], "--floor 17 is more than the 16 key channels a head"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], message: str, home: Path, tmp_path: Path
) -> None:
    choice = ("--ratio", "0.5", "--allocate", "auto", *flags)
    with pytest.raises(UserError, match=message) as caught:
        pruned(home / "gated_deltanet", tmp_path / "out", *choice)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_too_little_text_is_refused_before_any_work(home: Path, tmp_path: Path) -> None:
    choice = ("--ratio", "0.5", "--allocate", "auto", "--method", "l1", *words(home))
    expected = "and 100000 held-out ones after them for --allocate auto are too many"
    with pytest.raises(UserError, match=expected):
        pruned(home / "delta_net", tmp_path / "out", *choice, "--heldout-sequences", 100000)
    with pytest.raises(UserError, match="reads none: use slimstate prune"):
        stage(plan, home / "delta_net", tmp_path / "p", *choice[:6])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_plan_file_has_no_figure(home: Path, tmp_path: Path) -> None:
    choice = ("--ratio", "0.5", "--allocate", "auto", "--method", "l1", "--space", "value")
    pruned(home / "delta_net", tmp_path / "out", *choice, *words(home))
    content = json.loads((tmp_path / "out/plan.json").read_text())
    note = next(note for note in content["notes"] if "auto" in note)
    assert not any(character.isdigit() for character in note)
