"""Held-out perplexity: as by hand, the same for every form of a model and number of processes."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flame.checkpoint.reference import resolve
from flame.checkpoint.save import save_step
from flame.data.tokenizer import load_tokenizer, train_tokenizer
from flame.errors import UserError
from flame.process.distributed import process_group
from flame.versions import versions
from launch import evaluate
from launch.evaluate import STAGE, check
from launch.evaluation.heldout_text import HeldoutOptions, heldout_text
from launch.evaluation.intervals import standard_error
from launch.evaluation.perplexity import Perplexity, evaluate_perplexity
from tests.distributed import run_distributed
from tests.launch.speed.test_decoding import FAMILIES, stock_model

VOCABULARY = 300
TEXTS = [f"def f{i}(é):\n    return é * {i} + '€{i * i % 7}'\n" * (1 + i % 4) for i in range(40)]
ROWS = HeldoutOptions(seq_len=192)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a tokenizer, and one HF folder for each family."""
    folder = tmp_path_factory.mktemp("assets")
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "train.jsonl").write_text("".join(lines[10:]))
    (folder / "heldout.jsonl").write_text("".join(lines[:10]))
    train_tokenizer(TEXTS, VOCABULARY, folder / "tokenizer")
    for family in FAMILIES:
        model = stock_model(family, vocab_size=VOCABULARY)
        shutil.copytree(folder / "tokenizer", folder / family)
        model.save_pretrained(folder / family)
    write_run(folder / "run", folder / "gated_deltanet", folder)
    return folder


def write_run(run: Path, hf: Path, texts: Path) -> None:
    """A run folder with the weights of `hf` and a recipe."""
    shutil.copytree(hf, run, ignore=shutil.ignore_patterns("*.safetensors"))
    data = {"dataset": texts / "train.jsonl", "heldout": texts / "heldout.jsonl"}
    lines = [f'{key} = "{value}"' for key, value in data.items()]
    (run / "recipe.toml").write_text("\n".join(["[data]", *lines, "[training]", "seq_len = 192"]))
    save_step(load_file(hf / "model.safetensors"), run / "checkpoint", 7, alone=True)


def measured(model: Path, **options: Any) -> Perplexity:
    with process_group():
        return evaluate_perplexity(model, HeldoutOptions(**options))


def by_hand(folder: Path, family: str, texts: list[str], apart: bool) -> tuple[float, int, int]:
    """Loss, tokens and bytes from plain forward passes of the stock model over whole documents."""
    model, tokenizer = stock_model(family, vocab_size=VOCABULARY), load_tokenizer(str(folder))
    end = tokenizer.eos_token_id
    encoded = [[*tokenizer(text)["input_ids"], end] for text in texts]
    documents = encoded if apart else [[token for ids in encoded for token in ids]]
    loss, tokens = 0.0, 0
    for ids in documents:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        chosen = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
        loss, tokens = loss - float(chosen.sum()), tokens + len(ids) - 1
    first = texts if apart else texts[:1]
    unseen = sum(len(tokenizer.decode(tokenizer(text)["input_ids"][:1]).encode()) for text in first)
    return loss, tokens, sum(len(text.encode()) for text in texts) - unseen


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_perplexity_equals_plain_forward_passes(assets: Path, family: str) -> None:
    result = measured(assets / family, data=str(assets / "heldout.jsonl"), seq_len=100_000)
    loss, tokens, size = by_hand(assets / family, family, TEXTS[:10], apart=family != "llama")
    assert (result.tokens, result.bytes, result.sequences) == (tokens, size, 1)
    assert result.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(loss / math.log(2) / size, rel=1e-5)


def test_losses_are_kept_by_document(assets: Path) -> None:
    data, folder = str(assets / "heldout.jsonl"), assets / "gated_deltanet"
    result = measured(folder, data=data, seq_len=100_000)
    by_document = [by_hand(folder, "gated_deltanet", [text], True) for text in TEXTS[:10]]
    assert result.documents.tokens == [tokens for _, tokens, _ in by_document]
    assert result.documents.losses == pytest.approx([loss for loss, *_ in by_document], rel=1e-5)
    error = standard_error(result.documents)
    assert error is not None and result.error == pytest.approx(result.perplexity * error)
    assert sum(result.documents.losses) / result.tokens == pytest.approx(
        math.log(result.perplexity)
    )


def test_each_token_is_predicted_once_whatever_the_rows(assets: Path) -> None:
    data = str(assets / "heldout.jsonl")
    long, short = (measured(assets / "llama", data=data, seq_len=n) for n in (4096, 97))
    assert short.sequences == math.ceil(short.tokens / 97)
    assert (short.tokens, short.bytes) == (long.tokens, long.bytes)
    assert short.documents.tokens == long.documents.tokens and len(long.documents.tokens) == 10
    assert measured(assets / "llama", data=data, seq_len=97, max_sequences=2).tokens == 194


def ranks_result(model: str) -> dict[str, Any]:
    return evaluate_perplexity(model, ROWS).record()


def test_any_number_of_processes_gives_the_same(assets: Path) -> None:
    alone = measured(assets / "run", seq_len=192)
    assert alone.sequences % 2 == 1 and alone.sequences % 4 == 3, "ranks must run out of rows"
    for size in (2, 4):
        for record in run_distributed(ranks_result, size, str(assets / "run")):
            assert record["world_size"] == size
            assert record["perplexity"] == pytest.approx(alone.perplexity, rel=1e-9)
            assert record["bits_per_byte"] == pytest.approx(alone.bits_per_byte, rel=1e-9)
            assert (record["tokens"], record["bytes"]) == (alone.tokens, alone.bytes)
            assert record["documents"]["tokens"] == alone.documents.tokens
            assert record["documents"]["losses"] == pytest.approx(alone.documents.losses, rel=1e-9)
            assert record["error"] == pytest.approx(alone.error, rel=1e-6)
            assert record["parameters"] == alone.parameters


def test_run_step_and_hugging_face_folder_agree(assets: Path) -> None:
    run = measured(assets / "run")
    step = measured(assets / "run" / "checkpoint" / "step-7")
    hf = measured(assets / "gated_deltanet", data=str(assets / "heldout.jsonl"), seq_len=192)
    assert run.perplexity == step.perplexity == hf.perplexity
    assert run.seq_len == 192 and run.data.endswith("heldout.jsonl")


def test_figures_that_describe_the_model(assets: Path) -> None:
    result = measured(assets / "run", max_sequences=1)
    model = stock_model("gated_deltanet", vocab_size=VOCABULARY)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.state_bytes == 2 * 4 * 16 * 8 * 4
    assert result.dtype == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert result.versions == versions() and "torch" in result.versions
    llama = measured(assets / "llama", data=str(assets / "heldout.jsonl"), max_sequences=1)
    assert llama.state_bytes is None


def test_lora_run_is_evaluated_with_its_adapters(assets: Path, tmp_path: Path) -> None:
    from flame.checkpoint.fingerprint import fingerprint
    from flame.recipe.sections import Lora
    from flame.recovery.lora import write_adapter_files

    base, run, merged = assets / "gated_deltanet", tmp_path / "lora", tmp_path / "merged"
    write_run(run, base, assets)
    shutil.rmtree(run / "checkpoint")
    found = resolve(base)
    lora = Lora(rank=4, alpha=12.0, target_modules=["q_proj"])
    mark = fingerprint(found.config, found.source())
    write_adapter_files(run, lora, str(base), mark, found.config)
    torch.manual_seed(3)
    adapters, weights = {}, load_file(base / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.attn.q_proj"
        down, up = torch.randn(4, 32), torch.randn(32, 4)
        adapters[f"base_model.model.{name}.lora_A.weight"] = down
        adapters[f"base_model.model.{name}.lora_B.weight"] = up
        weights[f"{name}.weight"] += 3.0 * up @ down
    save_step(adapters, run / "checkpoint", 2, alone=True)
    shutil.copytree(base, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})

    data = str(assets / "heldout.jsonl")
    adapted = measured(run).perplexity
    assert adapted == pytest.approx(measured(merged, data=data, seq_len=192).perplexity, rel=1e-5)
    assert adapted != pytest.approx(measured(base, data=data, seq_len=192).perplexity, rel=1e-3)


def test_command_writes_json_and_prints_a_table(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    STAGE.main([str(assets / "run"), "--perplexity", "--json", str(out)])
    record = json.loads(out.read_text())
    expected = measured(assets / "run")
    assert record["perplexity"] == expected.perplexity and record["tokens"] == expected.tokens
    assert record["bits_per_byte"] == expected.bits_per_byte
    assert f"{record['perplexity']:,.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_command_on_two_processes(assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "launch.cli", "eval", str(assets / "run"), "--perplexity"]
    subprocess.run([*command, "--json", str(out), "--nproc", "2"], check=True, timeout=240)
    record = json.loads(out.read_text())
    assert record["world_size"] == 2
    assert record["perplexity"] == pytest.approx(measured(assets / "run").perplexity, rel=1e-9)


def test_recipe_is_the_default_and_options_replace_it(assets: Path) -> None:
    run = resolve(assets / "run")
    from_recipe = heldout_text(run, HeldoutOptions())
    assert (from_recipe.seq_len, from_recipe.config.heldout_split) == (192, "")
    own = heldout_text(run, HeldoutOptions(data="python-stdlib", split="train", seq_len=5))
    assert (own.name, own.seq_len) == ("python-stdlib:train", 5)
    assert heldout_text(resolve(assets / "llama"), HeldoutOptions(data="x")).seq_len == 2048


def edited(**changes: Any) -> Callable[[Path], None]:
    """A function that edits the `config.json` of a folder."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def removed(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]  # type: ignore[return-value]


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("arguments", "damage", "message"),
    [
        ([], None, "no recipe that names held-out text: give it as --perplexity DATA"),
        (["{empty}"], None, "has no text to evaluate on"),
        (["{missing}"], None, "missing"),
        (["{data}", "--seq-len", "0"], None, "--seq-len: 0 is not a whole number of at least 1"),
        (
            ["{data}", "--max-sequences", "-1"],
            None,
            "--max-sequences: -1 is not a whole number of at least 1",
        ),
        (["{data}", "--text-key", "body"], None, "body"),
        (["{data}"], removed(*TOKENIZER), "has no tokenizer: give --tokenizer FOLDER"),
        (["{data}", "--tokenizer", "{empty}"], None, "tokenizer"),
        (["{data}"], edited(vocab_size=299), "beyond the model's vocabulary of 299"),
        (["{data}"], edited(model_type="nonsense"), "unknown model family 'nonsense'"),
        (["{data}"], removed("config.json"), "config.json"),
        (["{data}"], lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (["{data}"], removed("model.safetensors"), "neither safetensors nor checkpoints"),
        (["{data}", "--json", "{empty}"], None, "exists: choose another, or pass --overwrite"),
        (["{data}", "--json", "{model}/x.json"], None, "lies inside the model's folder"),
    ],
)
def test_bad_input_is_refused_before_work(
    assets: Path,
    tmp_path: Path,
    arguments: list[str],
    damage: Callable[[Path], None] | None,
    message: str,
) -> None:
    model, empty = tmp_path / "model", tmp_path / "empty.txt"
    shutil.copytree(assets / "gated_deltanet", model)
    empty.write_text("")
    if damage is not None:
        damage(model)
    data, missing = assets / "heldout.jsonl", tmp_path / "missing.jsonl"
    places = {"model": model, "empty": empty, "data": data, "missing": missing}
    before = sorted(tmp_path.rglob("*"))
    argv = [str(model), "--perplexity", *(a.format(**places) for a in arguments)]
    with pytest.raises(UserError) as error:
        check(STAGE.parse(argv))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_recipe_without_heldout_text_names_the_way_out(assets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(assets / "run", run)
    recipe = (run / "recipe.toml").read_text().splitlines()
    (run / "recipe.toml").write_text("\n".join(r for r in recipe if "heldout =" not in r))
    with pytest.raises(UserError, match="give it as --perplexity DATA"):
        check(STAGE.parse([str(run), "--perplexity"]))


def test_measure_must_be_named(assets: Path) -> None:
    with pytest.raises(UserError, match="say what to measure: --perplexity"):
        check(STAGE.parse([str(assets / "run")]))


@pytest.mark.parametrize("model", ["no/such/folder/here", "/no/such/folder"])
def test_missing_model_is_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        STAGE.main([model, "--perplexity"])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("slimstate: error: ") and error.count("\n") == 1


def test_nan_weights_are_named_and_nothing_is_written(assets: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken", tmp_path / "figures.json"
    shutil.copytree(assets / "delta_net", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.attn.v_proj.weight"][0, 0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    argv = [str(broken), "--perplexity", str(assets / "heldout.jsonl"), "--json", str(out)]
    with pytest.raises(UserError, match=r"layers\.1\.attn\.v_proj\.weight holds 1 NaN"):
        evaluate.run(STAGE.parse(argv))
    assert not out.exists()


def test_a_dry_run_runs_no_code_of_task_files(assets: Path, tmp_path: Path) -> None:
    """Loading a task runs the modules that it names by `!function`."""
    from launch import cli

    (tmp_path / "code.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('has-run').touch()\ntext = str\n"
    )
    (tmp_path / "local_code.yaml").write_text(
        "task: local_code\ndataset_path: json\ndataset_kwargs:\n  data_files: data.jsonl\n"
        "test_split: train\noutput_type: loglikelihood\ndoc_to_text: !function code.text\n"
        'doc_to_target: "{{text}}"\n'
    )
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    words = ["eval", str(assets / "delta_net"), "--tasks", "local_code"]
    words += ["--task-path", str(tmp_path)]
    cli.main([*words, "--dry-run"])
    assert not (tmp_path / "has-run").exists()
    check(STAGE.parse(words[1:]))
    assert (tmp_path / "has-run").exists()
