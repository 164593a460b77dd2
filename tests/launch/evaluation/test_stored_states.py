"""`--state-dtype` of eval and recall: measured, counted in bytes, refused where it cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file

from flame.checkpoint.save import save_step
from flame.data.mqar_tokens import mqar_tokenizer
from flame.data.tokenizer import train_tokenizer
from flame.errors import UserError
from flame.options.shared import StoredAs
from kernels.stored_states import DTYPES, SCALED
from launch import evaluate, recall, report
from launch.evaluation import stored_states
from launch.serving.capacity import BYTES
from pruning.adapters import ADAPTERS
from tests.launch.speed.test_decoding import FAMILIES, stock_model
from tests.launch.task_files import TEXTS, write_tasks

VOCABULARY = 300
NUMBERS = 2 * 4 * 16 * 8
ROWS = 2 * 4 * 8


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks, text, a run, and a model of softmax attention."""
    folder = tmp_path_factory.mktemp("stored")
    write_tasks(folder / "tasks")
    train_tokenizer(TEXTS, VOCABULARY, folder / "llama")
    stock_model("llama", vocab_size=VOCABULARY).save_pretrained(folder / "llama")
    stock_model("gated_deltanet", vocab_size=VOCABULARY).save_pretrained(folder / "run")
    for file in (folder / "llama").glob("tokenizer*"):
        shutil.copy(file, folder / "run")
    weights = folder / "run" / "model.safetensors"
    save_step(load_file(weights), folder / "run" / "checkpoint", 1, alone=True)
    weights.unlink()
    text = folder / "tasks" / "texts.jsonl"
    (folder / "run" / "recipe.toml").write_text(
        f'[data]\nheldout = "{text}"\n[training]\nseq_len = 64\n'
    )
    return folder


def record_of(assets: Path, out: Path, *options: str) -> dict[str, Any]:
    run = str(assets / "run")
    evaluate.STAGE.main([run, "--perplexity", "--against", run, *options, "--json", str(out)])
    return json.loads(out.read_text())


def test_figures_and_bytes_are_those_of_the_stored_states(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = record_of(assets, tmp_path / "plain.json")
    whole = record_of(assets, tmp_path / "whole.json", "--state-dtype", "float32")
    assert whole["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    assert 0 <= whole["fidelity"]["kl"] < 1e-7
    assert whole["state_bytes"] == plain["state_bytes"] == 4 * NUMBERS
    kls = []
    for size, options in (
        (2 * NUMBERS, ["bfloat16"]),
        (NUMBERS * 3 // 2 + 4 * ROWS, ["int8", "--error-feedback", "int4"]),
        (NUMBERS + 4 * ROWS, ["float8"]),
    ):
        capsys.readouterr()
        file = tmp_path / f"{size}.json"
        record = record_of(assets, file, "--state-dtype", *options)
        assert record["state_bytes"] == size
        assert f"{size:,}" in capsys.readouterr().out
        kls.append(record["fidelity"]["kl"])
    assert 1e-8 < kls[0] < kls[2] and kls[1] < kls[2]
    with pytest.raises(UserError, match="results under other settings"):
        evaluate.check(evaluate.STAGE.parse([str(assets / "run"), "--perplexity", "--against",
            str(assets / "run"), "--state-dtype", "float16", "--json", str(file)]))  # fmt: skip


def test_a_report_has_the_run_alone(assets: Path, tmp_path: Path) -> None:
    shutil.copytree(assets / "run", tmp_path / "run")
    for name, options in (("a", []), ("b", ["--state-dtype", "int8"])):
        evaluate.STAGE.main([str(tmp_path / "run"), "--perplexity", "--json",
                             str(tmp_path / f"{name}.json"), *options])  # fmt: skip
    report.STAGE.main([str(tmp_path), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert f"{4 * NUMBERS:,}" in page and f"{NUMBERS + 4 * ROWS:,}" not in page


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama", ["--state-dtype", "int8"], "of 'llama': --state-dtype needs a family whose"),
        ("run", ["--error-feedback", "int4"], "--error-feedback is for --state-dtype float8 or"),
        ("run", ["--state-dtype", "bfloat16", "--state-scales", "tile"], "int8, not bfloat16"),
        ("run", ["--state-dtype", "int4"], "unknown 'int4': choose from float32"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    assets: Path, model: str, options: list[str], message: str
) -> None:
    data = str(assets / "tasks" / "texts.jsonl")
    for stage, check, more in (
        (evaluate.STAGE, evaluate.check, ["--perplexity", data]),
        (recall.STAGE, recall.check, []),
    ):
        with pytest.raises(UserError, match=message) as error:
            check(stage.parse([str(assets / model), *more, *options]))
        assert "\n" not in str(error.value)


def test_text_is_scored_and_generated_but_not_with_feedback(assets: Path, tmp_path: Path) -> None:
    def argv(*options: str) -> list[str]:
        tasks = ["--tasks", "local_cloze,local_writing", "--task-path", str(assets / "tasks")]
        return [str(assets / "run"), *tasks, "--state-dtype", "int8", *options]

    with pytest.raises(UserError, match="task local_writing generates text"):
        evaluate.check(evaluate.STAGE.parse(argv("--error-feedback")))
    evaluate.STAGE.main(argv("--json", str(tmp_path / "tasks.json")))
    results = json.loads((tmp_path / "tasks.json").read_text())["tasks"]["results"]
    assert set(results) == {"local_cloze", "local_writing"}


def test_recall_counts_the_bytes_too(tmp_path: Path) -> None:
    mqar_tokenizer("mqar:pairs=2,length=32,keys=10,values=10").save_pretrained(tmp_path / "m")
    stock_model("gated_deltanet", vocab_size=VOCABULARY).save_pretrained(tmp_path / "m")
    argv = [str(tmp_path / "m"), "--pairs", "2", "--examples", "4", "--state-dtype", "int8",
            "--state-scales", "tile", "--json", str(tmp_path / "r.json")]  # fmt: skip
    recall.STAGE.main(argv)
    (record,) = json.loads((tmp_path / "r.json").read_text())["models"].values()
    assert record["state_bytes"] == NUMBERS + 4 * 2 * 4
    assert record["stored_states"] == {"dtype": "int8", "scales": "tile", "error_feedback": None}


def test_names_of_dtypes_are_the_same_everywhere() -> None:
    assert set(get_args(StoredAs)) == set(DTYPES) == set(BYTES)
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == BYTES
    assert tuple(SCALED) == stored_states.SCALED
    for family in FAMILIES:
        config = stock_model(family, vocab_size=VOCABULARY).config.to_dict()
        if family in ADAPTERS:
            adapter = ADAPTERS[family]
            sizes = [4 * n * k * v for n, k, v in adapter.states(config)]
            assert sum(sizes) == adapter.state_bytes(config)
