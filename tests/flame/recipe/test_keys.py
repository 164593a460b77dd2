"""Recipe keys: what each takes, on a command line and in a file; and that no recipe runs code."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from flame.errors import UserError
from flame.recipe.keys import all_keys, fill, keys_of, sections
from flame.recipe.sections import Recipe
from flame.recipe.words import overriding

WRONG: list[Any] = [
    *(-2, 10**30, 1.5, -0.5, math.inf, math.nan, "", "\0", "a" * 300, "é" * 200, True),
    *([], [1], ["\n"], [math.nan], {}, {"a": 1}),
]
"""Values of every type; each key takes some and refuses the others by its name."""


@pytest.mark.parametrize("name", all_keys())
def test_a_key_takes_a_value_of_its_type_or_names_itself(name: str) -> None:
    section, _, key = name.partition(".")
    refused = 0
    for value in WRONG:
        recipe = Recipe()
        try:
            assert fill(recipe, {section: {key: value}}) == {}
        except UserError as error:
            assert name in str(error) and len(str(error)) < 200
            refused += 1
        else:
            kept = getattr(getattr(recipe, section), key)
            assert kept == value and not isinstance(kept, float) or math.isfinite(kept)
    assert refused >= 10


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("optimizer", "beta1", 1.0, "beta1 is 1.0: it takes a number from 0 to below 1"),
        ("optimizer", "lr", 0, "lr is 0.0: it takes a number above 0"),
        ("optimizer", "lr", math.inf, "optimizer.lr is inf"),
        ("lr_scheduler", "total_steps", math.inf, "total_steps is inf, not a whole number"),
        ("lr_scheduler", "decay_type", "steps", "decay_type is 'steps', not 'linear' or 'sqrt'"),
        ("data", "seed", -1, "data.seed is -1"),
        ("data", "weights", [math.nan], "weights"),
        ("training", "mixed_precision_param", "float8", "mixed_precision_param"),
        ("model", "init", "a" * 256, "256 bytes: no file has such a name"),
        ("job", "dump_folder", "a\nb", "without control characters"),
    ],
)
def test_values_out_of_bounds_are_refused(section: str, key: str, value: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        fill(Recipe(), {section: {key: value}})
    assert words in str(error.value)


def test_a_whole_number_may_stand_for_a_number() -> None:
    recipe = Recipe()
    fill(recipe, {"optimizer": {"beta1": 0, "lr": 1}, "lr_scheduler": {"decay_ratio": 1}})
    values = (recipe.optimizer.beta1, recipe.optimizer.lr, recipe.lr_scheduler.decay_ratio)
    assert [type(value) for value in values] == [float, float, float]


@pytest.mark.parametrize(
    ("words", "section", "key", "value"),
    [
        (["--training.steps", "7"], "training", "steps", 7),
        (["--training.seq-len=64"], "training", "seq_len", 64),
        (["--training.steps=1", "--training.steps=2"], "training", "steps", 2),
        (["--data.streaming"], "data", "streaming", True),
        (["--data.no-streaming"], "data", "streaming", False),
        (["--lora.merge", "false"], "lora", "merge", False),
        (["--data.sources", "a,b"], "data", "sources", ["a", "b"]),
        (["--data.sources", "mqar:pairs=2,keys=8", "b"], "data", "sources", None),
        (["--data.weights", "1,0.5"], "data", "weights", [1.0, 0.5]),
        (["--data.weights", "1", "0.5"], "data", "weights", [1.0, 0.5]),
        (["--lora.target_modules="], "lora", "target_modules", []),
        (["--debug.seed", "none"], "debug", "seed", None),
        (["--optimizer.lr", "1e-3"], "optimizer", "lr", 1e-3),
        (["--model.init", "-odd"], "model", "init", "-odd"),
    ],
)
def test_words_of_a_command_line(words: list[str], section: str, key: str, value: Any) -> None:
    if value is None and key == "sources":
        value = ["mqar:pairs=2,keys=8", "b"]
    recipe = Recipe()
    assert fill(recipe, overriding(["--job.config_file", "x.toml", *words])) == {}
    assert getattr(getattr(recipe, section), key) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.steps", "many"], "--training.steps: many is not a whole number"),
        (["--training.steps"], "--training.steps has no value"),
        (["--training.steps", "1", "2"], "--training.steps has 2 values"),
        (["--data.streaming", "perhaps"], "--data.streaming: 'perhaps' is neither true nor false"),
        (["--data.weights", "1,x"], "--data.weights: x is not a number"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_words_that_are_no_values(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        overriding(words)
    assert message in str(error.value)


def test_a_recipe_without_its_option_is_understood() -> None:
    from flame.train import STAGE

    with pytest.raises(UserError, match="did you mean --config mine.toml?"):
        STAGE.parse(["mine.toml", "--training.steps", "5"])


# torchtitan's keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"trainning": {"steps": 1}}, "section [trainning] is unknown: did you mean [training]?"),
        ({"training": {"step": 1}}, "training.step is unknown: did you mean training.steps?"),
        ({"training": {"lr": 1}}, "training.lr is unknown: did you mean optimizer.lr?"),
        ({"training": {"__class__": 1}}, "training.__class__ is unknown"),
        ({"quantize": {"linear": {"float8": {"emulat": True}}}}, "is unknown"),
        ({"quantize": {"linear": 3}}, "quantize.linear is not a section"),
        ({"model": {"name": "llama3"}}, "model.name is 'llama3', and nothing here reads it"),
        ({"model": {"converters": ["float8"]}}, "model.converters is ['float8']"),
        ({"training": {"dtype": "bfloat16"}}, "mixed_precision_param"),
        ({"compile": {"components": ["loss"]}}, "compile.components"),
        ({"checkpoint": {"enable": False}}, "a run without its last step is lost"),
        ({"checkpoint": {"folder": "steps"}}, "other commands look for the steps in checkpoint/"),
        ({"quantize": {"linear": {"float8": {"emulate": True}}}}, "nothing here reads it"),
        ({"comm": {"mode": "fake_backend"}}, "nothing here reads it"),
        ({"validation": {"dataset": "c4"}}, "name the text in data.heldout"),
    ],
)
def test_keys_without_an_effect_are_refused(tables: dict[str, Any], words: str) -> None:
    from flame.config import job_from_tables

    with pytest.raises(UserError) as error:
        job_from_tables(tables)
    assert words in str(error.value)


def test_keys_of_torchtitan_may_say_their_default() -> None:
    from flame.config import job_from_tables

    same = {"training": {"mixed_precision_reduce": "float32", "dtype": "float32"}}
    job = job_from_tables(same, overriding(["--training.dtype", "float32", "--checkpoint.enable"]))
    assert (job.model.name, job.checkpoint.last_save_model_only) == ("causal_lm", False)


def test_the_job_has_every_key_with_its_default() -> None:
    from flame.config import JobConfig

    job, recipe = JobConfig(), Recipe()
    for name, of in sections().items():
        for key in keys_of(of):
            value = getattr(getattr(recipe, name), key)
            assert getattr(getattr(job, name), key) == value, f"{name}.{key}"


@pytest.mark.parametrize("how", ["file", "words", "experimental"])
@pytest.mark.parametrize("also", [[], ["--estimate"], ["--dry-run"]])
def test_no_module_that_a_recipe_names_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, also: list[str]
) -> None:
    from launch.cli import dispatch

    (tmp_path / "strangers_code.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = tmp_path / "recipe.toml"
    key = {"file": "job.custom_config_module", "words": "job.custom_config_module"}.get(
        how, "experimental.custom_import"
    )
    section, _, name = key.partition(".")
    recipe.write_text("" if how == "words" else f"[{section}]\n{name} = 'strangers_code'\n")
    words = [f"--{key}", "strangers_code"] if how == "words" else []
    with pytest.raises(UserError, match="no module that a recipe names is ever imported"):
        dispatch(["train", "--config", str(recipe), *words, *also])
    assert "strangers_code" not in sys.modules
