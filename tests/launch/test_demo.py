"""The main job on two gloo processes, in miniature: what it leaves, what a stranger can load."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

MODELS = ("dense", "dense_continued", "pruned", "random", "recovered")
SMALL = ["--steps", "6", "--recovery-steps", "3", "--sequences", "3", "--heldout", "5"]

STRANGER = """
import json, sys
import fla
from transformers import AutoModelForCausalLM

model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=False, output_loading_info=True
)
assert not {name.partition(".")[0] for name in sys.modules} & {"flame", "pruning", "launch"}
print(json.dumps({
    "class": type(model).__module__ + "." + type(model).__name__,
    "missing": sorted(info["missing_keys"]),
    "unexpected": sorted(info["unexpected_keys"]),
    "mismatched": sorted(map(str, info["mismatched_keys"])),
    "head_k_dim": model.model.layers[0].attn.head_k_dim,
    "head_v_dim": model.model.layers[0].attn.head_v_dim,
}))
"""


def slimstate(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words], capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "runs"
    done = slimstate("demo", "--out", str(out), *SMALL)
    assert done.returncode == 0, done.stderr
    assert set(MODELS) <= set(done.stdout.split())
    return out


def test_it_leaves_what_it_promises(demo: Path) -> None:
    for name in ("dense", "pruned", "recovered"):
        for part in ("config.json", "recipe.toml", "tokenizer.json", "checkpoint"):
            assert (demo / name / part).exists(), f"{name}/{part}"
    for name in ("export/model.safetensors", "report.html", "pruned/plan.json"):
        assert (demo / name).is_file(), name


def test_summary_has_every_figure_as_measured(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    for name in MODELS:
        row = summary[name]
        assert row["perplexity"] == pytest.approx(
            2 ** (row["bits_per_byte"] * summary_ratio(summary, name)), rel=1e-6
        )
        assert row["parameters"] > 0 and row["decode_tokens_per_second"] > 0
    assert summary["world_size"] == 2
    assert summary["pruned"]["state_bytes"] * 2 == summary["dense"]["state_bytes"]
    assert summary["pruned"]["parameters"] < summary["dense"]["parameters"]
    assert {"pretrain", "calibrate", "prune", "recover", "evaluate", "total"} <= set(
        summary["seconds"]
    )
    assert summary["pruned"]["perplexity"] != summary["random"]["perplexity"]


def test_the_report_holds_what_was_measured(demo: Path) -> None:
    text = (demo / "report.html").read_text()
    for heading in (
        "Fidelity",
        "trained on from pruned for 3 steps",
        "Speed and memory of recovered against dense",
        "What was pruned, and how",
        "Rank of the states of recovered",
        "Training loss",
        "Singular values of the states",
    ):
        assert heading in text, heading
    summary = json.loads((demo / "summary.json").read_text())
    for name in MODELS:
        assert f"{summary[name]['perplexity']:,.3f}" in text
    for file, model in (
        ("fidelity.json", "dense_continued"),
        ("bench.json", "dense"),
        ("decoding.json", "random"),
    ):
        assert model in (demo / file).read_text()
    stages = {words.split()[1] for words in summary["commands"]}
    assert stages >= {"train", "calibrate", "prune", "convert", "eval", "analyze", "bench"}


def summary_ratio(summary: dict[str, Any], name: str) -> float:
    """Bytes a token, the same for all rows since they read the same text."""
    from math import log2

    first = summary[MODELS[0]]
    return log2(first["perplexity"]) / first["bits_per_byte"]


def test_a_second_run_skips_what_is_done(demo: Path) -> None:
    def stamps() -> dict[str, int]:
        files = [*demo.glob("*/checkpoint/*/.metadata"), *demo.glob("export/*")]
        return {str(path): path.stat().st_mtime_ns for path in files}

    before = stamps()
    again = slimstate("demo", "--out", str(demo), *SMALL)
    assert again.returncode == 0, again.stderr
    assert stamps() == before and len(before) >= 8


def test_other_options_in_the_same_folder_are_refused(demo: Path) -> None:
    refused = slimstate("demo", "--out", str(demo), "--steps", "7")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1 and "other options" in refused.stderr


def test_a_stranger_loads_the_export(demo: Path, tmp_path: Path) -> None:
    """Outside the repository, with fla and transformers alone."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(demo / "export")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"].startswith("fla.models.gated_deltanet.")
    assert found["missing"] == found["unexpected"] == found["mismatched"] == []
    assert (found["head_k_dim"], found["head_v_dim"]) == (16, 48)


def test_exported_logits_equal_the_checkpoints(demo: Path) -> None:
    from transformers import AutoModelForCausalLM

    import flame.register  # noqa: F401
    from flame.checkpoint.load import load_model
    from flame.checkpoint.reference import resolve

    exported = AutoModelForCausalLM.from_pretrained(demo / "export").eval()
    trained = load_model(resolve(str(demo / "recovered")))
    tokens = torch.randint(4096, (2, 150), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, actual = trained(tokens).logits, exported(tokens).logits
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
