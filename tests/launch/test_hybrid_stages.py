"""What is measured of a model, measured on hybrids: analyze, recall, bench, LoRA's targets."""

import json
import shlex
from pathlib import Path

import pytest

from flame.model import meta_model
from flame.recipe.sections import Lora
from flame.recovery.lora import inject
from launch import cli
from tests.pruning import kda_hybrids
from tests.pruning.families import build as build_fla
from tests.pruning.families import tiny_config
from tests.pruning.hybrids import CONFIGS, build
from tests.pruning.models import write_hf, write_text

FLA = tiny_config("gated_deltanet grouped values, hybrid", vocab_size=300)
QWEN = CONFIGS["qwen3_5_text"] | {"vocab_size": 300}
KDA = {name: config | {"vocab_size": 300} for name, config in kda_hybrids.CONFIGS.items()}
HEADS = {"fla": 4, "qwen": 6} | {name: config["linear_num_heads"] for name, config in KDA.items()}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in KDA else []) for name in HEADS]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrids")
    write_text(folder)
    write_hf(folder / "fla", FLA, dict(build_fla(FLA).state_dict()))
    for name, config in {"qwen": QWEN, **KDA}.items():
        write_hf(folder / name, config, dict(build(config).state_dict()))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_those_of_the_linear_layers(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their split into a low and a high group counts every head of these layers once."""
    monkeypatch.chdir(home)
    text = "--data text.jsonl --tokenizer tokenizer --length 64 --sequences 2"
    cli.main(shlex.split(f"analyze {name} ranks-{name} {text}"))
    model = json.loads(Path(f"ranks-{name}/summary.json").read_text())["model"]
    assert [layer["layer"] for layer in model["layers"]] == [0, 2]
    for split in model["groups"].values():
        assert split["low_heads"] + split["high_heads"] == 2 * HEADS[name]
        assert {layer for layer, _ in split["high"]} <= {0, 2}


@pytest.mark.parametrize("name", NAMES)
def test_heads_of_high_and_of_low_rank_are_pruned_apart(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directions, as 2602.02195 removes heads and the other way round, and at random."""
    monkeypatch.chdir(home)
    data = "--data text.jsonl --tokenizer tokenizer --sequences 2 --seq-len 64"
    cli.main(shlex.split(f"calibrate {name} stats-{name} --methods jrnp {data}"))
    kept: list[dict[str, list[list[int]]]] = []
    for way in ("jrnp --direction high", "jrnp --direction low", "random"):
        out = f"plan-{name}-{len(kept)}.json"
        given = f"--stats stats-{name}" if "jrnp" in way else ""
        words = f"--method {way} --space head --ratio 0.5 --multiple-of 1 {given}"
        cli.main(shlex.split(f"plan {name} {out} {words}"))
        kept.append(json.loads(Path(out).read_text())["spaces"])
    high, low, random = kept
    assert set(high) == set(low) == set(random) == {"layers.0.head", "layers.2.head"}
    assert high != low


@pytest.mark.parametrize("name", NAMES)
def test_recall_and_bench_take_them(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    options = "--pairs 2 --length 32 --examples 4 --tokenizer tokenizer"
    cli.main(shlex.split(f"recall {name} {options} --json recall-{name}.json"))
    sizes = "--batch-sizes 1 --decode-length 2 --prompt-length 8 --repeats 1 --measure decode"
    cli.main(shlex.split(f"bench {name} {sizes} --json bench-{name}.json"))
    for stage in ("recall", "bench"):
        assert name in Path(f"{stage}-{name}.json").read_text()


def test_fused_projections_are_targets_by_name() -> None:
    model = meta_model(QWEN)
    names = ["in_proj_qkv", "in_proj_z", "out_proj"]
    inject(model, Lora(rank=2, alpha=4.0, target_modules=names))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    prefix = "model.layers.{}.linear_attn.{}"
    assert adapted == {prefix.format(layer, name) for layer in (0, 2) for name in names}
