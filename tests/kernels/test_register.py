"""`import flame.register`: what it imports, that it can be repeated, and the foreign `kernels`."""

import os
import subprocess
import sys
from pathlib import Path

import fla.ops.delta_rule
import pytest
import torch

import flame.register
from kernels import fla_cpu

ROOT = Path(__file__).parents[2]

FORWARDS = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
shape = dict(hidden_size=32, num_hidden_layers=1, vocab_size=20)
llama = AutoModelForCausalLM.from_config(
    LlamaConfig(**shape, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
)
x = torch.arange(6).view(1, 6)
assert llama(x).logits.isfinite().all()
import flame.register
from fla.models import GatedDeltaNetConfig
gdn = AutoModelForCausalLM.from_config(GatedDeltaNetConfig(**shape, num_heads=2, head_dim=16))
assert gdn(x).logits.isfinite().all()
assert llama(x).logits.isfinite().all()
assert "torchtitan" not in sys.modules
import kernels
print(getattr(kernels, "__file__", None))
"""


def run(*folders: Path) -> str:
    """Run FORWARDS with these folders before the repository on the path; return what it prints."""
    path = os.pathsep.join(map(str, (*folders, ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", FORWARDS],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_llama_and_gated_deltanet_without_the_foreign_package():
    assert run() == "None"


@pytest.mark.slow
def test_llama_and_gated_deltanet_with_the_foreign_package(tmp_path: Path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    if subprocess.run([*install, "kernels"], capture_output=True).returncode:
        pytest.skip("the Hugging Face package `kernels` cannot be installed here")
    assert run(tmp_path) == str(tmp_path / "kernels" / "__init__.py")


def test_our_submodules_have_names_of_their_own():
    """Those of the foreign package, which one merged `kernels.__path__` would mix with ours."""
    theirs = {
        "archs", "backends", "benchmark", "benchmarks", "cli", "compat", "deps", "hf_hub",
        "importer", "install", "layer", "load", "locking", "status", "utils", "validate", "verify",
    }  # fmt: skip
    ours = {path.stem for path in (ROOT / "kernels").iterdir()}
    assert not ours & theirs
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_registering_again_changes_nothing():
    operator = fla.ops.delta_rule.chunk_delta_rule
    paths = list(sys.modules["kernels"].__path__)
    flame.register.register()
    assert fla.ops.delta_rule.chunk_delta_rule is operator
    assert list(sys.modules["kernels"].__path__) == paths


def test_only_cpu_tensors_come_to_us():
    accepts = fla_cpu._accepts_cpu
    assert accepts(x=None, q=torch.ones(1))[0]
    assert accepts(q=torch.ones(1, device="meta")) == (False, "the input is on meta")
    assert not accepts(3)[0]
