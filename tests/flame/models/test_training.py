"""Our model classes in the trainer: two gloo processes, resumed, reloaded, adapted, converted.

And the hybrids of Kimi Delta Attention, one of which has a class of ours.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.errors import UserError
from flame.models import MODULES
from tests.distributed import run_distributed
from tests.flame.jobs import TINY, largest_difference, make_job, train_job
from tests.pruning import kda_hybrids

CONFIGS: dict[str, dict[str, Any]] = {
    "slim_gated_deltanet": TINY
    | {
        "model_type": "slim_gated_deltanet",
        "architectures": ["SlimGatedDeltaNetForCausalLM"],
        "num_v_heads": 4,
        "widths": {"key": [[9, 16], [12]], "value": [24, 17], "heads": [2, 1]},
    },
    "delta_net2": {key: TINY[key] for key in TINY if key not in ("head_dim", "expand_v")}
    | {"model_type": "delta_net2", "architectures": ["DeltaNet2ForCausalLM"]}
    | {"share_kv_conv": True, "qk_activation": "identity"},
    **{name: {**config, "vocab_size": 300} for name, config in kda_hybrids.CONFIGS.items()},
}
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in kda_hybrids.CONFIGS else [])
    for name in CONFIGS
]


@pytest.fixture(scope="module", params=NAMES)
def run(
    request: pytest.FixtureRequest,
    assets: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """The overrides of a job, and the run that three steps of it made on two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIGS[request.param]))
    overrides = {"model__config": str(config), "training__steps": 3}
    run_distributed(train_job, 2, assets, folder / "run", **overrides)
    return folder / "run", overrides


def test_two_processes_train_and_resume_bit_for_bit(
    run: tuple[Path, dict],
    assets: Path,
    tmp_path: Path,
) -> None:
    done, overrides = run
    for steps in (1, 3):
        job = overrides | {"training__steps": steps}
        run_distributed(train_job, 2, assets, tmp_path / "run", **job)
    final = "checkpoint/step-3"
    assert largest_difference(done / final, tmp_path / "run" / final) == 0.0


def test_one_process_trains_as_two(
    run: tuple[Path, dict],
    assets: Path,
    tmp_path: Path,
) -> None:
    done, overrides = run
    run_distributed(train_job, 1, assets, tmp_path / "run", **overrides)
    final = "checkpoint/step-3"
    # Gradients of hyper-connections nearly cancel (1e-6), and AdamW divides by their size.
    bound = 1e-3 if "glm5" in overrides["model__config"] else 1e-4
    assert largest_difference(done / final, tmp_path / "run" / final) < bound


def test_reloaded_by_transformers_and_back(run: tuple[Path, dict], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from flame.checkpoint.convert import convert
    from flame.checkpoint.load import load_model
    from flame.checkpoint.reference import resolve

    done, _ = run
    convert(done, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "dcp", "dcp")
    ours = resolve(done).config["model_type"] in MODULES
    assert ("import flame.register" in (tmp_path / "hf" / "README.md").read_text()) == ours
    expected = load_model(resolve(done)).state_dict()
    for found in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict(),
        load_model(resolve(tmp_path / "dcp")).state_dict(),
    ):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_adapters_are_trained_and_merged(
    run: tuple[Path, dict],
    assets: Path,
    tmp_path: Path,
) -> None:
    from flame.checkpoint.load import load_model
    from flame.checkpoint.reference import resolve

    done, overrides = run
    job = overrides | {"lora__rank": 4, "lora__alpha": 8.0, "model__init": str(done)}
    job |= {"distill__teacher": str(done), "distill__temperature": 2.0}
    run_distributed(train_job, 2, assets, tmp_path / "run", **job)
    base, merged = (load_model(resolve(each)) for each in (done, tmp_path / "run" / "merged"))
    assert type(merged) is type(base)
    change = {
        name: float((tensor - base.state_dict()[name]).abs().max())
        for name, tensor in merged.state_dict().items()
    }
    for part, moves in ((".q_proj.", True), ("conv1d.", True), ("embed", False)):
        changes = {value for name, value in change.items() if part in name and ".1." not in name}
        assert changes and all((value > 0) == moves for value in changes), part


def test_a_config_with_wrong_widths_is_refused_before_work(assets: Path, tmp_path: Path) -> None:
    from flame.training.job_checks import check_job

    wrong = CONFIGS["slim_gated_deltanet"] | {"widths": {"heads": [2, 3]}}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    job = make_job(assets, tmp_path / "run", model__config=str(tmp_path / "config.json"))
    with pytest.raises(UserError, match=r"widths.heads\[1\] is 3"):
        check_job(job, 1)
    assert not (tmp_path / "run").exists()
