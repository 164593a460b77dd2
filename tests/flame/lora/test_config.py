"""A stranger's adapters: wrong types, expressions that never end, bases that name each other."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.lora.config import AdapterConfig
from flame.lora.patterns import PATIENCE
from tests.flame.lora.adapter_kinds import UNTIED, lora, save_adapters
from tests.flame.lora.test_merging import adapters_on, as_folder
from tests.flame.tiny import build, stored_tensors


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    base = as_folder(folder / "base", UNTIED, stored_tensors(build(UNTIED)))
    return adapters_on(base, save_adapters(folder / "adapter", lora(), build(UNTIED)))


def changed(adapters: Path, into: Path, **values: Any) -> Path:
    into.mkdir()
    settings = json.loads((adapters / "adapter_config.json").read_text())
    (into / "adapter_config.json").write_text(json.dumps({**settings, **values}))
    (into / "adapter_model.safetensors").symlink_to(adapters / "adapter_model.safetensors")
    return into


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_alpha": 10**400}, "a number of 401 digits"),
        ({"lora_alpha": 1e35}, r"lora_alpha is 1e\+35"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": None}, "has no lora_alpha"),
        ({"r": 0}, "r is 0"),
        ({"r": 10**9}, "r is 1000000000"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": 5}, "is of rank 4, adapter_config.json says 5"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"use_dora": 1}, "use_dora is 1"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is no table"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern of 'q_proj' is 'x'"),
        ({"alpha_pattern": {"q_proj": [1]}}, "alpha_pattern of 'q_proj'"),
        ({"alpha_pattern": {"(q_proj": 1}}, "alpha_pattern has .*missing"),
        ({"alpha_pattern": {"a" * 1001: 1}}, "an expression of 1001 characters"),
        ({"alpha_pattern": {"((.|..|...)*.)*[A-Z]": 1}}, "takes for ever"),
        ({"peft_type": "LORAX"}, "type 'LORAX'"),
        ({"peft_type": ["LORA"]}, "cannot be merged"),
        ({"new_option": {"x": 1}}, "sets new_option, which peft"),
        ({"init_lora_weights": "pissa_niter_16"}, "anew at each load"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights"),
        ({"use_dora": True}, "use_dora"),
        ({"kasa_config": 3}, "peft refuses"),
        ({"kasa_config": {"beta": 10**15}}, "beta is 1000000000000000, expected at most"),
        ({"qalora_group_size": 10**6}, "qalora_group_size is 1000000"),
        ({"base_model_name_or_path": 3}, "names no base model"),
        ({"base_model_name_or_path": ""}, "names no base model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said_in_one_line(
    adapters: Path, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as raised:
        source = resolve(changed(adapters, tmp_path / "adapter", **values)).source()
        source.read("model.layers.0.attn.q_proj.weight")
    assert len(str(raised.value)) < 500


def test_pickled_adapters_are_refused_by_name(adapters: Path, tmp_path: Path) -> None:
    folder = changed(adapters, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="as a pickle"):
        resolve(folder)


def test_patterns_are_matched_as_peft_matches_them() -> None:
    from peft.utils.other import get_pattern_key

    modules = ["model.layers.0.attn.q_proj", "model.layers.10.attn.q_proj", "q_proj", "x.q_proj_2"]
    patterns = [
        "q_proj",
        "layers.0.attn.q_proj",
        r".*\.0\..*",
        "^model.layers.1",
        "q.proj",
        "a|q_proj",
    ]
    for pattern in patterns:
        config = AdapterConfig({"lora_alpha": 1, "alpha_pattern": {pattern: 2}})
        for module in modules:
            theirs = get_pattern_key([pattern], module) == pattern
            assert config.alpha(module) == (2 if theirs else 1), (pattern, module)


def test_many_slow_patterns_share_one_bound() -> None:
    patterns = {f"((.|..|...)*.)*[A-Z]{i}": 1 for i in range(20)}
    config = AdapterConfig({"lora_alpha": 1, "alpha_pattern": patterns})
    began = time.monotonic()
    with pytest.raises(UserError, match="takes for ever"):
        config.alpha("model.layers.0.attn.q_proj" * 3)
    # One match alone may take all of the patience; twenty of them may not.
    assert time.monotonic() - began < 10 * PATIENCE


def test_a_base_that_names_itself(adapters: Path, tmp_path: Path) -> None:
    folder = changed(adapters, tmp_path / "a", base_model_name_or_path=str(tmp_path / "a"))
    with pytest.raises(UserError, match="themselves as base"):
        resolve(folder)
    changed(adapters, tmp_path / "b", base_model_name_or_path="../c")
    changed(adapters, tmp_path / "c", base_model_name_or_path=str(tmp_path / "x" / ".." / "b"))
    (tmp_path / "x").mkdir()
    for name in "bc":
        with pytest.raises(UserError, match="themselves as base"):
            resolve(tmp_path / name)


def test_runs_that_name_each_other(adapters: Path, tmp_path: Path) -> None:
    """Folders with a config of their own are found; their tensors come back to themselves."""
    for name, other in (("a", "b"), ("b", "a")):
        folder = changed(adapters, tmp_path / name, base_model_name_or_path=f"../{other}")
        (folder / "config.json").write_text(json.dumps(UNTIED))
    with pytest.raises(UserError, match="themselves as base"):
        resolve(tmp_path / "a").source()


def test_a_long_chain_of_adapters_ends(adapters: Path, tmp_path: Path) -> None:
    for number in range(40):
        changed(adapters, tmp_path / str(number), base_model_name_or_path=f"../{number + 1}")
    with pytest.raises(UserError, match="more than 8 adapters"):
        resolve(tmp_path / "0")
