"""Generation with a cache is recomputation without one: every family, dense and pruned, padded."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pruning.adapters import PRUNED
from tests.pruning.families import tokens
from tests.pruning.models import write_hf
from tests.pruning.transform.test_masked_sliced import (
    BUDGET,
    CASES,
    applied,
    build_sensitive,
    kinds_of,
    pruned,
    reloaded,
)

LENGTHS = (80, 12, 33)
"""Prompts of one batch: fla takes the chunked operator above 64 tokens, the recurrent one below."""

NEW = 5

FIRST = {config["model_type"]: name for name, config in reversed(CASES.items())}
SLIM = [family for family in FIRST if f"slim_{family}" in PRUNED]


def check_generation(model: nn.Module) -> None:
    """Hold a left-padded batch to each prompt alone, computed whole for every new token."""
    rows = [tokens(1, length, seed=n) for n, length in enumerate(LENGTHS)]
    width = max(LENGTHS)
    batch, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for n, row in enumerate(rows):
        batch[n, width - row.shape[1] :], mask[n, width - row.shape[1] :] = row[0], 1
    found = model.generate(  # type: ignore[operator]
        batch,
        attention_mask=mask.long(),
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    for row, made in zip(rows, found[:, width:], strict=True):
        assert_greedy(model, torch.cat([row, made[None]], dim=1))


@torch.no_grad()
def assert_greedy(model: nn.Module, row: Tensor) -> None:
    """The last `NEW` tokens of `row` `[1, T]` have the largest logits, to rounding."""
    logits = model(row, use_cache=False).logits[0, -NEW - 1 : -1]
    chosen = logits.gather(-1, row[0, -NEW:, None])[:, 0]
    scale = logits.std()
    assert float((logits.amax(-1) - chosen).max() / scale) < 1e-6


@pytest.mark.parametrize("family", FIRST)
def test_the_cache_of_the_first_of_each_family(family: str, tmp_path: Path) -> None:
    case = FIRST[family]
    kinds = kinds_of(case)[-1]
    dense, _ = pruned(tmp_path, CASES[case], [*BUDGET, "--space", kinds])
    check_generation(dense)
    check_generation(reloaded(tmp_path / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in FIRST.values()])
def test_the_cache_of_the_others(case: str, tmp_path: Path) -> None:
    dense, _ = pruned(tmp_path, CASES[case], [*BUDGET, "--space", kinds_of(case)[-1]])
    check_generation(dense)
    check_generation(reloaded(tmp_path / "hf"))


@pytest.mark.parametrize("family", SLIM)
def test_the_cache_of_uneven_widths(family: str, tmp_path: Path) -> None:
    applied(tmp_path, CASES[FIRST[family]], "key", pad=False)
    check_generation(reloaded(tmp_path / "hf"))


def test_a_forgotten_cache_would_be_seen(tmp_path: Path) -> None:
    """What transformers 5.24 does with fla 0.6: every token starts from an empty state."""
    config = CASES[FIRST["gated_deltanet"]]
    write_hf(tmp_path / "hf", config, build_sensitive(config).state_dict())
    model = reloaded(tmp_path / "hf")
    forward = model.forward
    model.forward = lambda *args, past_key_values=None, **options: forward(*args, **options)
    with pytest.raises(AssertionError):
        check_generation(model)
