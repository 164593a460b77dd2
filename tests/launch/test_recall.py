"""Recall: its tasks and scores on models that know, and the command on real ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flame.checkpoint.reference import resolve
from flame.checkpoint.save import save_step
from flame.data.mqar import FILLER, Mqar
from flame.data.mqar_tokens import mqar_tokenizer
from flame.data.tokenizer import train_tokenizer
from flame.errors import UserError
from flame.process.distributed import process_group
from launch.evaluation.recall_score import WordEncoder, accuracy, right_answers
from launch.evaluation.recall_tables import mqar_table, needle_table
from launch.evaluation.recall_tasks import mqar_examples, needle_examples
from launch.recall import STAGE, check, measure, task_of
from tests.distributed import run_distributed
from tests.launch.speed.test_decoding import stock_model

TASK = Mqar(pairs=(2, 6), length=32, keys=10, values=10)
VOCABULARY = 300


@pytest.fixture(scope="module")
def symbols() -> WordEncoder:
    return WordEncoder(mqar_tokenizer(TASK.name))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of the task's vocabulary, `trained` with a recipe, and a model of text."""
    folder = tmp_path_factory.mktemp("models")
    for name, family in (("trained", "gated_deltanet"), ("other", "llama")):
        stock_model(family, vocab_size=22).save_pretrained(folder / name)
        mqar_tokenizer(TASK.name).save_pretrained(folder / name)
    (folder / "trained" / "recipe.toml").write_text(f'[data]\ndataset = "{TASK.name}"\n')
    weights = load_file(folder / "trained" / "model.safetensors")
    save_step(weights, folder / "trained" / "checkpoint", 3, alone=True)
    stock_model("gated_deltanet", vocab_size=VOCABULARY).save_pretrained(folder / "text")
    train_tokenizer(["The key k1 of v2 is in the station."] * 9, VOCABULARY, folder / "text")
    return folder


def knowing(choose: Callable[[list[int], int], int]) -> Callable[..., Any]:
    """A causal model whose first choice after `tokens[: t + 1]` is `choose(tokens, t)`."""

    def forward(input_ids: Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, 400)
        for row, tokens in enumerate(input_ids.tolist()):
            for t in range(len(tokens)):
                logits[row, t, choose(tokens, t)] = 1
        return SimpleNamespace(logits=logits)

    return forward


def recalls(tokens: list[int], t: int) -> int:
    """What followed the token the last time that it was there."""
    before = [i for i in range(t) if tokens[i] == tokens[t]]
    return tokens[before[-1] + 1] if before else 0


def forgets_half(tokens: list[int], t: int) -> int:
    """As `recalls`, for keys with an even token id alone."""
    return recalls(tokens, t) if tokens[t] % 2 == 0 else 0


def test_an_oracle_is_right_and_a_guess_is_not(symbols: WordEncoder) -> None:
    examples = list(mqar_examples(TASK, 6, 20, seed=0))
    oracle: Any = knowing(recalls)
    assert accuracy(oracle, examples, symbols, 8) == 1.0
    assert accuracy(knowing(lambda tokens, t: 12), examples, symbols, 8) < 0.25  # type: ignore
    asked = [symbols(e.words[place - 1])[0] for e in examples for place in e.answers]
    expected = [token % 2 == 0 for token in asked]
    assert right_answers(knowing(forgets_half), examples, symbols) == expected
    assert accuracy(knowing(forgets_half), examples, symbols, 7) == pytest.approx(  # type: ignore
        sum(expected) / len(expected)
    )


@pytest.mark.parametrize("missed", [0, 1, 2, 3])
def test_an_answer_of_several_tokens_is_right_as_a_whole(missed: int, tmp_path: Path) -> None:
    encode = WordEncoder(train_tokenizer(["no merges"], 257, tmp_path))
    (example,) = needle_examples(TASK, 20, 50, encode, 1, seed=0)
    tokens = [i for word in example.words for i in encode(word)]
    # Right but for one token, counted from the last.
    wrong = len(tokens) - 1 - missed

    def knows(row: list[int], t: int) -> int:
        return 0 if t + 1 in (wrong, len(row)) else tokens[t + 1]

    assert len(encode(example.words[-1])) == 3
    assert right_answers(knowing(knows), [example], encode) == [missed == 3]


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (50, 20), (100, 40)])
def test_needle_lies_at_its_depth(symbols: WordEncoder, depth: int, place: int) -> None:
    for example in needle_examples(TASK, 40, depth, symbols, 5, seed=1):
        key, value = example.words[place : place + 2]
        assert example.words[-2:] == [key, value]
        assert example.words.count(FILLER) == 40
        assert (len(example.words), example.answers) == (44, [43])


def test_needle_in_text_is_a_sentence_among_sentences(tmp_path: Path) -> None:
    encode = WordEncoder(train_tokenizer(["The secret"], VOCABULARY, tmp_path))
    for depth in (0, 30, 100):
        for example in needle_examples(TASK, 60, depth, encode, 5, seed=1):
            words = example.words
            place = words.index("secret") - 1
            assert place == 0 or words[place - 1] == "."
            assert abs(place - 0.6 * depth) <= 6
            assert words[place : place + 6] == words[-6:]
            assert (words[-3][0], words[-1][0]) == ("k", "v")
            assert (len(words), example.answers) == (73, [72])


def test_examples_are_seeded() -> None:
    def words(seed: int, pairs: int = 6) -> list[list[str]]:
        return [example.words for example in mqar_examples(TASK, pairs, 4, seed)]

    assert words(0) == words(0)
    assert words(0) != words(1)
    assert words(0)[:2] != words(0)[2:]


def test_sizes_are_those_that_the_model_was_trained_on(models: Path) -> None:
    trained, text = resolve(models / "trained"), resolve(models / "text")
    assert task_of(STAGE.parse(["m"]), trained) == TASK
    assert task_of(STAGE.parse(["m", "--pairs", "3"]), trained) == Mqar((3,), 32, 10, 10)
    assert task_of(STAGE.parse(["m", "--pairs", "3"]), resolve(models / "other")) == Mqar(
        (3,), 12, 10, 10
    )
    assert task_of(STAGE.parse(["m"]), resolve(models / "other")) == Mqar((4, 8), 32, 10, 10)
    assert task_of(STAGE.parse(["m"]), text) == Mqar((4, 8, 16), 64, 64, 64)
    assert task_of(STAGE.parse(["m", "--pairs", "99,2"]), text) == Mqar((2, 99), 396, 99, 99)


def measured(models: Path, *arguments: str) -> list[dict[str, Any]]:
    names = [str(models / name) for name in ("trained", "other")]
    return measure(STAGE.parse([*names, "--examples", "11", "--batch", "4", *arguments]))


def test_any_number_of_processes_gives_the_same(models: Path) -> None:
    arguments = ("--needle", "20", "--depths", "0,100", "--pairs", "2,6")
    with process_group():
        alone = measured(models, *arguments)
    # Three batches: at two processes one of them has nothing to do in the last round.
    for records in run_distributed(measured, 2, models, *arguments):
        for record, other in zip(records, alone, strict=True):
            assert (record.pop("world_size"), other["world_size"]) == (2, 1)
            assert record == {key: value for key, value in other.items() if key != "world_size"}
    assert [cell["pairs"] for cell in alone[0]["mqar"]] == [2, 6]
    assert [(cell["length"], cell["depth"]) for cell in alone[0]["needle"]] == [(20, 0), (20, 100)]


def test_accuracy_equals_that_of_plain_forward_passes(models: Path, symbols: WordEncoder) -> None:
    with process_group():
        record = measured(models, "--pairs", "6")[1]
    model, right = stock_model("llama", vocab_size=22), []
    for example in mqar_examples(TASK, 6, 11, seed=0):
        tokens = torch.tensor([[symbols(word)[0] for word in example.words]])
        with torch.no_grad():
            choice = model(input_ids=tokens).logits[0].argmax(-1)
        right += [bool(choice[n - 1] == tokens[0, n]) for n in example.answers]
    assert record["mqar"][0]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_command_prints_a_table_and_writes_json(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recall.json"
    STAGE.main([str(models / "text"), "--pairs", "2", "--needle", "30", "--examples", "3",
          "--depths", "50", "--query-noise", "--json", str(file)])  # fmt: skip
    out = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["kind"] == "recall" and result["command"].endswith(f"--json {file}")
    (record,) = result["models"].values()
    assert mqar_table([record]).text() in out and needle_table([record]).text() in out
    assert "2 pairs" in out and "30 words, at 50 %" in out
    assert "amplification" in out and len(record["query_noise"]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing"),
        (["trained", "--pairs", "11"], "cannot state 11 pairs with 10 keys"),
        (["trained", "--length", "20"], "cannot place 6 pairs in 20 words"),
        (["other", "--pairs", "2", "--query-noise"], "of 'llama': --query-noise needs a family"),
        (["bare"], "has no tokenizer: give --tokenizer FOLDER"),
    ],
)
def test_what_cannot_work_is_refused_before(
    models: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    shutil.copytree(models / "other", tmp_path / "bare", ignore=shutil.ignore_patterns("tok*"))
    folder = tmp_path if arguments[0] == "bare" else models
    given = [str(folder / word) if (folder / word).is_dir() else word for word in arguments]
    with pytest.raises(UserError, match=message):
        check(STAGE.parse(given))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--pairs", "4,x"], "--pairs: x is not a whole number of at least 1"),
        (["--depths", "101"], "--depths: 101 is not a whole number from 0 to 100"),
        (["--needle", "1"], "--needle: 1 is not a whole number of at least 8"),
    ],
)
def test_numbers_out_of_range_are_refused(option: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        STAGE.parse(["m", *option])
