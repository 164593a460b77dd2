"""Further families from training to a stock model of less state, and training on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from pruning import prune
from pruning.adapters import adapter_for
from tests.distributed import run_distributed
from tests.flame.jobs import losses_of, tensors_of, train_job, write_assets
from tests.flame.training.test_trainer import continue_pruned
from tests.pruning.families import tokens

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "hidden_ratio": 2,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gated_deltaproduct": {
        **COMMON,
        "architectures": ["GatedDeltaProductForCausalLM"],
        "expand_v": 1.0,
        "num_householder": 2,
        "use_forget_gate": True,
        "allow_neg_eigval": True,
    },
    "gated_deltanet": {
        **COMMON,
        "architectures": ["GatedDeltaNetForCausalLM"],
        "num_hidden_layers": 3,
        "expand_v": 1.0,
        "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 24},
    },
    "kda": {
        **COMMON,
        "architectures": ["KDAForCausalLM"],
        "num_v_heads": 4,
        "expand_v": 0.5,
    },
}
SPACES = {"gated_deltaproduct": "key,value,head", "gated_deltanet": "key,value", "kda": "key,head"}

RELOAD = """
import json, sys, torch
import fla, transformers
if json.load(open(sys.argv[1] + "/config.json")).get("attn"):
    sys.path.insert(0, sys.argv[4])
    import flame.register
model, report = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, output_loading_info=True
)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
ours = {"pruning"} if "flame" in sys.modules else {"flame", "pruning", "kernels"}
assert not ours & {name.split(".")[0] for name in sys.modules}
sys.path.insert(0, sys.argv[4])
import flame.register
with torch.no_grad():
    torch.save(model.eval()(torch.load(sys.argv[2])).logits, sys.argv[3])
"""
"""Plain transformers and fla load the model; to run it on a CPU takes our operators.

Without flash-attn fla does not even build its hybrids: these take our registration to load.
"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_from_training_to_a_smaller_stock_model(family: str, assets: Path, tmp_path: Path) -> None:
    config = {"model_type": family, **FAMILIES[family]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    training = {"model__config": str(tmp_path / "config.json"), "training__steps": 3}
    for world_size in (1, 2):
        run_distributed(train_job, world_size, assets, tmp_path / f"run{world_size}", **training)
    one, two = (losses_of(tmp_path / f"run{n}") for n in (1, 2))
    assert len(two) == 3 and two[-1] < two[0]
    torch.testing.assert_close(two, one, rtol=2e-5, atol=2e-5)
    check_replicated_parameters(tmp_path)
    for form in ("hf", "dcp"):
        command = [str(tmp_path / "run2"), str(tmp_path / form), "--method", "l1", "--to", form]
        options = prune.STAGE.parse([*command, "--ratio", "0.5", "--space", SPACES[family]])
        prune.check(options)
        prune.run(options)
    out = tmp_path / "hf"
    small, adapter = json.loads((out / "config.json").read_text()), adapter_for(config)
    parts = 2 ** len(SPACES[family].split(","))
    assert adapter.state_bytes(small) * parts == adapter.state_bytes(config)
    assert small["architectures"] == config["architectures"]
    ids = tokens(2, 100)
    torch.save(ids, tmp_path / "ids")
    paths = (out, tmp_path / "ids", tmp_path / "logits", Path(__file__).parents[3])
    command = [sys.executable, "-c", RELOAD, *map(str, paths)]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
    with torch.no_grad():
        expected = load_model(resolve(out)).eval()(ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected)
    run_distributed(continue_pruned, 2, tmp_path / "dcp", 5)
    assert losses_of(tmp_path / "dcp")[-1] < two[0]
    step = tensors_of(tmp_path / "dcp" / "checkpoint" / "step-5")
    assert float(step["optimizer.state.model.layers.0.attn.k_proj.weight.step"]) == 5


def check_replicated_parameters(folder: Path) -> None:
    """FSDP2 does not reduce them: at two processes they must be trained as at one."""
    one, two = (tensors_of(folder / f"run{n}" / "checkpoint" / "step-3") for n in (1, 2))
    names = [name for name in one if name.endswith(("A_log", "dt_bias"))]
    moments = [f"optimizer.state.{name}.exp_avg_sq" for name in names]
    assert len(names) == 4
    for name in (*names, *moments):
        assert one[name].dtype == torch.float32 and float(one[name].abs().max()) > 0
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-9)
