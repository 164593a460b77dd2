"""A stranger's `config.json`: sizes, types and keys that no model has, in one line each."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.hugging_face.config_file import read_config
from flame.hugging_face.config_keys import unknown_keys
from flame.model import meta_model, stock_config
from tests.flame.tiny import GATED_DELTANET, LLAMA, build, stored_tensors, write_hf_folder

VALUES: list[Any] = [10**7, 10**18, -1, 1.5, "12", True, {}, 10**39, float("inf"), float("nan")]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**7, "num_hidden_layers is 10000000, expected 0 to 4,096"),
        ("num_heads", 10**10, "num_heads is 10000000000"),
        ("vocab_size", -1, "vocab_size is -1, expected 0 to"),
        ("hidden_size", "32", "hidden_size is '32', expected a whole number"),
        ("head_dim", 6.5, "head_dim is 6.5, expected a whole number"),
        ("text_config", {"num_hidden_layers": 10**7}, "text_config.num_hidden_layers is"),
    ],
)
def test_sizes_that_no_model_has_are_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GATED_DELTANET, key: value}))
    with pytest.raises(UserError, match=message):
        resolve(tmp_path)


@pytest.mark.parametrize("config", [GATED_DELTANET, LLAMA], ids=["gated_deltanet", "llama"])
def test_any_value_builds_a_model_or_is_refused_in_one_line(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path, refused = tmp_path / "config.json", 0
    for key in sorted({*config, "attn", "rope_parameters", "hidden_act"} - {"model_type"}):
        for value in VALUES:
            path.write_text(json.dumps({**config, key: value}))
            try:
                meta_model(read_config(path))
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50


def test_keys_that_the_class_ignores_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    config = {**GATED_DELTANET, "head_dimm": 12, "rope_theta": 1e4, "_name_or_path": "x"}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            stock_config(config)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "head_dimm (did you mean head_dim?)" in warnings[0]
    assert "rope_theta" not in warnings[0]


def test_classes_know_the_keys_that_they_save(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    for family in ("gated_deltanet", "delta_net", "kda", "qwen3_next", "qwen3_5", "kimi_linear"):
        stock = CONFIG_MAPPING[family]()
        assert list(unknown_keys(stock, stock.to_dict())) == []


def test_a_class_that_ties_by_default_needs_no_key(tmp_path: Path) -> None:
    from flame.checkpoint.convert import convert

    config = {
        **{key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"},
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "head_dim": 8,
    }
    folder = write_hf_folder(tmp_path / "hf", config, stored_tensors(build(config)))
    convert(folder, tmp_path / "run", "dcp")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    assert resolve(tmp_path / "back").source().names() == resolve(folder).source().names()
