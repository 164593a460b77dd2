"""The divergence that a sweep measures in its one pass is that of `eval --against`."""

from pathlib import Path

import pytest

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.process.distributed import process_group
from launch.evaluation.fidelity import sum_divergences
from launch.evaluation.heldout_text import HeldoutOptions, heldout_text
from launch.evaluation.perplexity import evaluate_perplexity
from launch.sweeping.measuring import Dense, in_memory, measured
from tests.pruning.models import GATED_DELTANET, weights, write_run, write_text

RECIPE = """
[data]
dataset = "{0}/text.jsonl"
heldout = "{0}/text.jsonl"
tokenizer = "{0}/tokenizer"
"""


def test_one_pass_gives_losses_and_divergence(tmp_path: Path) -> None:
    write_text(tmp_path)
    recipe = RECIPE.format(tmp_path)
    names = [str(tmp_path / f"seed-{seed}") for seed in (0, 1)]
    for seed, name in enumerate(names):
        tensors = weights(GATED_DELTANET, seed)
        write_run(Path(name), GATED_DELTANET, tensors, recipe=recipe)
    dense, other = names
    options = HeldoutOptions(seq_len=48, max_sequences=6, spread=True)
    text = in_memory(heldout_text(resolve(dense), options))
    rows = list(text.sequences(GATED_DELTANET["vocab_size"], True))
    with process_group():
        models = [load_model(resolve(name)) for name in (other, dense)]
        kl, _, tokens, documents = sum_divergences(*models, rows)
        keeping, running = Dense(dense, "float32"), Dense(dense, "float32", room=0)
        for against in (keeping, keeping, running):
            found = measured(other, text, "float32", "other", against)
            assert found["kl"] == pytest.approx(kl / tokens, rel=1e-6) and kl > 0
            assert found["divergences"]["tokens"] == documents.tokens
            assert found["divergences"]["losses"] == pytest.approx(documents.losses, rel=1e-6)
        assert len(keeping.kept) == len(rows) and not running.kept
        assert found["perplexity"] == evaluate_perplexity(other, options, "float32").perplexity
