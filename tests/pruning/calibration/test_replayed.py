"""On which sequences layers are repeated without single channels."""

from pathlib import Path

import pytest

from flame.checkpoint.reference import ModelReference
from pruning.calibration.data import calibration_data
from pruning.options import DataOptions
from tests.pruning.models import GATED_DELTANET


@pytest.mark.parametrize(
    ("sequences", "seq_len", "fraction", "tokens"),
    [
        (16, 2048, None, 8192),
        (64, 512, None, 8192),
        (128, 2048, None, 8192),
        (16, 1000, None, 9000),
        (3, 64, None, 192),
        (1, 16384, None, 16384),
        (16, 2048, 1.0, 32768),
        (16, 2048, 0.5, 16384),
    ],
)
def test_as_many_as_hold_enough_tokens(
    sequences: int, seq_len: int, fraction: float | None, tokens: int
) -> None:
    options = DataOptions(
        data="text.jsonl",
        tokenizer="tokenizer",
        sequences=sequences,
        seq_len=seq_len,
        replay_fraction=fraction,
    )
    data = calibration_data(_reference(), options)
    assert data.replayed_tokens == tokens
    assert ("replay_fraction" in data.record()) == (tokens < sequences * seq_len)


def _reference() -> ModelReference:
    return ModelReference(Path("model"), None, GATED_DELTANET, None, None)
