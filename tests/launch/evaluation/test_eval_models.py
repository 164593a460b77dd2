"""`slimstate eval` over several models: one table, resumed, with tasks and fidelity."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flame.checkpoint.save import save_step
from flame.data.heldout import Heldout
from flame.data.tokenizer import train_tokenizer
from flame.errors import UserError
from flame.process.distributed import process_group
from launch import evaluate
from launch.evaluate import STAGE, check
from launch.evaluation import measures
from launch.evaluation.fidelity import divergence, sum_divergences
from launch.reporting.envelope import measuring
from tests.distributed import run_distributed
from tests.launch.speed.test_decoding import stock_model
from tests.launch.task_files import TASKS, TEXTS, task_file, write_tasks

VOCABULARY = 300


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks, text, a run of three steps and the Hugging Face folder of the last."""
    folder = tmp_path_factory.mktemp("eval")
    write_tasks(folder / "tasks")
    train_tokenizer(TEXTS, VOCABULARY, folder / "tokenizer")
    hf, run = folder / "hf", folder / "run"
    stock_model("gated_deltanet", vocab_size=VOCABULARY).save_pretrained(hf)
    shutil.copytree(folder / "tokenizer", hf, dirs_exist_ok=True)
    shutil.copytree(hf, run, ignore=shutil.ignore_patterns("*.safetensors"))
    text = folder / "tasks" / "texts.jsonl"
    (run / "recipe.toml").write_text(f'[data]\nheldout = "{text}"\n[training]\nseq_len = 64\n')
    weights = load_file(hf / "model.safetensors")
    for step, scale in [(2, 0.5), (10, 0.9), (9, 1.0)]:
        scaled = {name: value * scale for name, value in weights.items()}
        save_step(scaled, run / "checkpoint", step, alone=True)
    return folder


@pytest.fixture
def run(assets: Path, tmp_path: Path) -> Path:
    shutil.copytree(assets / "run", tmp_path / "run")
    return tmp_path / "run"


def steps(run: Path) -> list[str]:
    return [str(run / "checkpoint" / f"step-{step}") for step in (2, 9, 10)]


def tasks_of(assets: Path, *names: str) -> list[str]:
    return [
        "--tasks",
        ",".join(f"local_{name}" for name in names),
        "--task-path",
        str(assets / "tasks"),
    ]


def test_all_steps_of_a_run_come_out_as_one_table(
    assets: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = [
        *tasks_of(assets, "cloze", "writing"),
        "--perplexity",
        "--against",
        str(assets / "hf"),
    ]
    STAGE.main([f"{run}/checkpoint/*", *arguments, "--json", str(out)])
    printed = capsys.readouterr().out
    lines = [line.split()[0] for line in printed.splitlines()[2:]]
    assert lines == steps(run)
    for heading in ("perplexity", "KL (nats)", "top-1 agreement", "local_cloze acc", "state bytes"):
        assert heading in printed.splitlines()[0]

    models = json.loads(out.read_text())["models"]
    assert list(models) == steps(run)
    assert "±" in printed.splitlines()[0] and "nats above the first [95 %]" in printed
    differences = json.loads(out.read_text())["differences"]
    assert list(differences) == steps(run)[1:]
    for name, found in differences.items():
        gap = math.log(models[name]["perplexity"] / models[steps(run)[0]]["perplexity"])
        assert found["against"] == steps(run)[0]
        assert found["loss"] == pytest.approx(gap) and found["low"] <= gap <= found["high"]
    same, other = models[steps(run)[1]], models[steps(run)[0]]
    assert same["fidelity"]["kl"] == 0 and same["fidelity"]["agreement"] == 1
    assert other["fidelity"]["kl"] > 0.01 and other["fidelity"]["agreement"] < 1
    assert same["fidelity"]["tokens"] == same["tokens"]
    assert same["tasks"]["versions"] == {"local_cloze": 1.5, "local_writing": 1.5}
    assert {same["tasks"]["dtype"], same["dtype"]} == {"float32"}


def test_second_call_measures_only_what_is_missing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measured = tmp_path / "out.json", []
    record = measures._Bench.record

    def spy(bench: Any, name: str, reference: Any) -> Any:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(name)
        return record(bench, name, reference)

    arguments = [*steps(run), "--perplexity", "--json", str(out)]
    monkeypatch.setattr(measures._Bench, "record", spy)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(STAGE.parse(arguments))
    assert list(json.loads(out.read_text())["models"]) == steps(run)[:1]

    def note(bench: Any, name: str, reference: Any) -> Any:
        measured.append(name)
        return record(bench, name, reference)

    monkeypatch.setattr(measures._Bench, "record", note)
    STAGE.main(arguments)
    assert measured == steps(run)
    STAGE.main(arguments)
    assert measured == steps(run)
    (run / "checkpoint" / "step-9" / ".metadata").touch()
    STAGE.main(arguments)
    assert measured == [*steps(run), steps(run)[1]]
    with pytest.raises(UserError, match="holds results under other settings"):
        check(STAGE.parse([*arguments, "--max-sequences", "1"]))


def test_single_model_keeps_its_keys_at_the_top(
    assets: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = [str(run), "--perplexity", *tasks_of(assets, "choices"), "--json", str(out)]
    STAGE.main(arguments)
    first = json.loads(out.read_text())
    assert {"perplexity", "bits_per_byte", "tokens", "tasks"} <= set(first)
    assert first["weights"].endswith("step-10")
    table = capsys.readouterr().out
    STAGE.main(arguments)
    assert json.loads(out.read_text()) == first and capsys.readouterr().out == table


def test_two_calls_on_one_file_do_not_lose_figures(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    first, second, third = steps(run)
    for model in (first, second):
        STAGE.main([model, "--perplexity", "--json", str(out)])
    assert list(json.loads(out.read_text())["models"]) == [first, second]
    for overwrite in ([], ["--overwrite"]):
        options = STAGE.parse([third, "--perplexity", "--json", str(out), *overwrite])
        check(options)
        with measuring(out), pytest.raises(UserError, match="another job is writing"):
            evaluate.run(options)
    assert list(json.loads(out.read_text())["models"]) == [first, second]


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        check(STAGE.parse([*arguments]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_models_of_one_table_read_the_same_text(assets: Path, run: Path, tmp_path: Path) -> None:
    hf, text = str(assets / "hf"), str(assets / "tasks" / "texts.jsonl")
    message = refused(str(run), hf, "--perplexity", text)
    assert "rows of 64 tokens and" in message and message.endswith("give --seq-len N for both")
    out = tmp_path / "out.json"
    STAGE.main([f"{run}/checkpoint/step-9", hf, "--perplexity", text, "--seq-len", "64",
                "--json", str(out)])  # fmt: skip
    one, other = json.loads(out.read_text())["models"].values()
    for key in ("perplexity", "tokens", "bytes", "sequences", "documents"):
        assert one[key] == other[key], key

    other_run = tmp_path / "other"
    shutil.copytree(run, other_run)
    shutil.copy(text, tmp_path / "more.jsonl")
    recipe = f'[data]\nheldout = "{tmp_path}/more.jsonl"\n[training]\nseq_len = 64\n'
    (other_run / "recipe.toml").write_text(recipe)
    assert "give --perplexity DATA for both" in refused(str(run), str(other_run), "--perplexity")
    # Neither may a later call join rows of another length to the same file.
    again = [hf, "--perplexity", text, "--json", str(out)]
    assert "results under other settings" in refused(*again)


def test_models_with_other_tokens_are_not_compared(assets: Path, tmp_path: Path) -> None:
    hf, other, text = assets / "hf", tmp_path / "other", str(assets / "tasks" / "texts.jsonl")
    shutil.copytree(hf, other)
    train_tokenizer(TEXTS, VOCABULARY - 20, tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", other, dirs_exist_ok=True)
    message = refused(str(hf), str(other), "--perplexity", text)
    assert "have different tokenizers" in message
    # A model that cannot keep documents apart makes all read rows as one text.
    stock_model("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "llama")
    shutil.copytree(assets / "tokenizer", tmp_path / "llama", dirs_exist_ok=True)
    records = ranks_record([str(hf), str(tmp_path / "llama"), "--perplexity", text])
    one, third = records.values()
    assert not one["apart"] and not third["apart"]
    assert one["tokens"] == third["tokens"] and one["bytes"] == third["bytes"]


def test_tasks_show_all_models_as_much(assets: Path, tmp_path: Path) -> None:
    hf, longer = assets / "hf", tmp_path / "longer"
    shutil.copytree(hf, longer)
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    models = [str(hf), str(longer), *tasks_of(assets, "cloze")]
    assert "at most 2,048 tokens at once and" in refused(*models)
    check(STAGE.parse([*models, "--max-length", "512"]))


def ranks_record(arguments: list[str]) -> dict[str, Any]:
    options = STAGE.parse(arguments)
    return measures.evaluate_models(options.models, options.measures, evaluate._results(options))


@pytest.mark.parametrize("placement", ["whole", "sharded"])
def test_any_number_of_processes_gives_the_same(assets: Path, placement: str) -> None:
    model = str(assets / "run" / "checkpoint" / "step-2")
    arguments = [model, "--perplexity", "--against", str(assets / "hf"), *tasks_of(assets, "cloze")]
    with process_group():
        alone = ranks_record(arguments)[model]
    for records in run_distributed(ranks_record, 2, [*arguments, "--placement", placement]):
        found = records[model]
        assert found["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
        assert found["fidelity"]["kl"] == pytest.approx(alone["fidelity"]["kl"], rel=1e-5)
        assert found["fidelity"]["tokens"] == alone["fidelity"]["tokens"]
        cloze, expected = (r["tasks"]["results"]["local_cloze"] for r in (found, alone))
        assert cloze["perplexity,none"] == pytest.approx(expected["perplexity,none"], rel=1e-4)
        assert found["sharded"] == (placement == "sharded") and found["world_size"] == 2


def test_divergence_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 7, 11, dtype=torch.float64, generator=generator)
    p[0] = q[0]
    expected = 0.0
    for ours, theirs in zip(q.softmax(-1).tolist(), p.softmax(-1).tolist(), strict=True):
        expected += sum(t * math.log(t / o) for t, o in zip(theirs, ours, strict=True))
    value, agreeing = divergence(q, p)
    assert float(value.sum()) == pytest.approx(expected, rel=1e-5)
    assert agreeing == int((p.argmax(-1) == q.argmax(-1)).sum())


def test_divergence_counts_predicted_tokens_of_all_rows() -> None:
    one, other = (stock_model("llama", vocab_size=61, initializer_range=s) for s in (0.3, 0.2))
    rows = []
    for length in (5, 700):
        tokens = torch.arange(length)[None] % 61
        labels = torch.where(tokens % 3 == 0, -100, tokens)
        rows.append(Heldout({"input": tokens}, labels, 0, torch.full((length,), len(rows))))
    kl, agreeing, tokens, documents = sum_divergences(one, other, rows)
    assert list(documents.tokens) == [int((row.labels != -100).sum()) for row in rows]
    assert tokens == sum(documents.tokens) and kl == pytest.approx(sum(documents.losses))
    expected = 0.0
    for inputs, labels, *_ in rows:
        with torch.no_grad():
            mine, theirs = (m(input_ids=inputs["input"]).logits[0].double() for m in (one, other))
        p, q = theirs.log_softmax(-1), mine.log_softmax(-1)
        expected += float(((p.exp() * (p - q)).sum(-1))[labels[0] != -100].sum())
    assert kl == pytest.approx(expected, rel=1e-5) and 0 <= agreeing <= tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "local_cloz"], "unknown task local_cloz: did you mean local_cloze"),
        (
            ["--tasks", "local_cloze", "--limit", "0"],
            "--limit: 0 is not a whole number of at least 1",
        ),
        (
            ["--tasks", "local_cloze", "--num-fewshot", "-1"],
            "--num-fewshot: -1 is not a whole number of at least 0",
        ),
        (
            ["--tasks", "local_cloze", "--batch", "0"],
            "--batch: 0 is not a whole number of at least 1",
        ),
        (["--tasks", "local_cloze", "--task-path", "/gone"], "--task-path /gone is not a folder"),
        (["--tasks", "local_cloze", "--tokenizer", "{tasks}"], "has no tokenizer"),
        (["--tasks", ""], "say what to measure: --perplexity"),
        (["--tasks", ","], "--tasks: ',' has an empty part"),
        (["--against", "/gone"], "no model at /gone"),
        (["--against", "{llama}"], "has a vocabulary of 300 and"),
        (["{run}", "--perplexity"], "is named twice"),
        (["{run}/checkpoint/no*", "--perplexity"], "no folder matches"),
        (["{bare}", "--tasks", "local_cloze"], "bare has no tokenizer: give --tokenizer FOLDER"),
        (
            ["{llama}", "--tasks", "local_cloze", "--max-length", "4096"],
            "beyond the 2048 positions",
        ),
    ],
)
def test_bad_input_is_one_line(
    assets: Path,
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from launch.lm import tasks

    indexed = tasks._indexed
    monkeypatch.setattr(tasks, "_indexed", lambda path, defaults: indexed(path, False))
    stock_model("llama", vocab_size=61).save_pretrained(tmp_path / "llama")
    shutil.copytree(assets / "tokenizer", tmp_path / "llama", dirs_exist_ok=True)
    stock_model("delta_net", vocab_size=VOCABULARY).save_pretrained(tmp_path / "bare")
    places = {
        "run": run,
        "tasks": assets / "tasks",
        "llama": tmp_path / "llama",
        "bare": tmp_path / "bare",
    }
    own = [argument.format(**places) for argument in arguments]
    if "--task-path" not in own:
        own += ["--task-path", str(assets / "tasks")]
    with pytest.raises(UserError) as error:
        check(STAGE.parse([str(run), *own]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_data_is_found_before_work(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "x.yaml").write_text(task_file("x", TASKS["cloze"], "gone.jsonl"))
    with pytest.raises(UserError, match="task local_x needs the file gone.jsonl or .*/tasks/gone"):
        check(STAGE.parse([str(run), "--tasks", "local_x", "--task-path", str(folder)]))


def test_missing_lm_eval_names_the_extra(
    assets: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a)
    )
    with pytest.raises(UserError, match=r"pip install 'slimstate\[tasks\]'"):
        check(STAGE.parse([str(run), *tasks_of(assets, "cloze")]))


def test_nan_weight_is_named_by_tasks_too(assets: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(assets / "hf", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.attn.v_proj.weight"][0, 0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.attn\.v_proj\.weight holds 1 NaN"):
        evaluate.run(STAGE.parse([str(broken), *tasks_of(assets, "rolling")]))
