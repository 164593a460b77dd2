"""lm-eval's tasks: the scores of its stock `hf` model, at every number of processes."""

import json
import math
import shutil
from collections.abc import Iterator
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
from launch.lm.batching import alike, batches, padded, score
from launch.lm.finite import NotFiniteError
from launch.lm.model import SlimstateLM
from launch.lm.network import Placement, fits_whole, load_network
from launch.lm.tasks import TaskOptions, evaluate_tasks, headline, load_tasks
from tests.distributed import run_distributed
from tests.launch.speed.test_decoding import stock_model
from tests.launch.task_files import TASKS, TEXTS, task_file, write_tasks

VOCABULARY = 300
NAMES = tuple(f"local_{name}" for name in TASKS)
LENGTH = 48
"""Shorter than many of the texts, so that contexts are cut."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks and with models of several families and forms."""
    folder = tmp_path_factory.mktemp("lm")
    write_tasks(folder / "tasks")
    train_tokenizer(TEXTS, VOCABULARY, folder / "tokenizer")
    for family in ("gated_deltanet", "delta_net", "llama"):
        stock_model(family, vocab_size=VOCABULARY).save_pretrained(folder / family)
        shutil.copytree(folder / "tokenizer", folder / family, dirs_exist_ok=True)
    hf, run = folder / "gated_deltanet", folder / "run"
    shutil.copytree(hf, run, ignore=shutil.ignore_patterns("*.safetensors"))
    save_step(load_file(hf / "model.safetensors"), run / "checkpoint", 7, alone=True)
    return folder


def our_lm(model: Path, placement: Placement = "whole", batch: int = 4) -> SlimstateLM:
    network = load_network(resolve(model), torch.float32, placement)
    return SlimstateLM(network, load_tokenizer(str(model)), LENGTH, batch)


def stock_lm(model: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    import flame.register  # noqa: F401

    # One request at a time: nothing is padded.
    return HFLM(str(model), device="cpu", dtype="float32", batch_size=1, max_length=LENGTH)


def requests(kind: str) -> list[Any]:
    """Requests of one kind: long and short, some of them the same, some without a context."""
    from lm_eval.api.instance import Instance

    texts = [*TEXTS, TEXTS[0], "é"]
    arguments: dict[str, list[tuple]] = {
        "loglikelihood": [
            pair
            for text in texts
            for pair in [(text, " é"), (text, "f"), (text[:30] + " ", "return é"), ("", text[:20])]
        ],
        "loglikelihood_rolling": [(text,) for text in [*texts, ""]],
        "generate_until": [
            (text, settings)
            for text in texts
            for settings in [{"until": ["\n", "f3"], "max_gen_toks": 6}, {"max_gen_toks": 9}]
        ],
    }
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments[kind])]  # type: ignore[arg-type]


KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def answers(lm: Any) -> dict[str, list[Any]]:
    return {kind: getattr(lm, kind)(requests(kind)) for kind in KINDS}


def ranks_answers(model: Path, placement: Placement) -> dict[str, list[Any]]:
    return answers(our_lm(model, placement))


@pytest.fixture(scope="module")
def stock(assets: Path) -> Iterator[dict[str, dict[str, list[Any]]]]:
    """What lm-eval's own model answers, by family."""
    families = ("gated_deltanet", "delta_net", "llama")
    yield {family: answers(stock_lm(assets / family)) for family in families}


def assert_same(ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> None:
    assert ours["generate_until"] == theirs["generate_until"]
    rolling = theirs["loglikelihood_rolling"]
    assert ours["loglikelihood_rolling"] == pytest.approx(rolling, rel=1e-5, abs=1e-4)
    pairs = zip(ours["loglikelihood"], theirs["loglikelihood"], strict=True)
    for (own, own_greedy), (their, their_greedy) in pairs:
        assert own == pytest.approx(their, rel=1e-5, abs=1e-4)
        assert own_greedy == their_greedy


@pytest.mark.parametrize("family", ["gated_deltanet", "delta_net", "llama"])
def test_answers_are_those_of_the_stock_model(assets: Path, stock: Any, family: str) -> None:
    with process_group():
        ours = answers(our_lm(assets / family))
    assert_same(ours, stock[family])
    assert len({text for text in ours["generate_until"]}) > 3, "the model must write something"


@pytest.mark.parametrize(
    ("size", "placement"),
    [
        (2, "whole"),
        (2, "sharded"),
        pytest.param(4, "whole", marks=pytest.mark.slow),
        pytest.param(4, "sharded", marks=pytest.mark.slow),
    ],
)
def test_processes_share_the_requests(
    assets: Path, stock: Any, size: int, placement: Placement
) -> None:
    for ours in run_distributed(ranks_answers, size, assets / "run", placement):
        assert_same(ours, stock["gated_deltanet"])


def test_adapters_are_merged_with_their_base(assets: Path, tmp_path: Path) -> None:
    from flame.checkpoint.fingerprint import fingerprint
    from flame.recipe.sections import Lora
    from flame.recovery.lora import write_adapter_files

    base, run, merged = assets / "delta_net", tmp_path / "lora", tmp_path / "merged"
    for copy in (run, merged):
        shutil.copytree(base, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    found = resolve(base)
    lora = Lora(rank=2, alpha=6.0, target_modules=["v_proj"])
    write_adapter_files(
        run, lora, str(base), fingerprint(found.config, found.source()), found.config
    )
    name, weights = "model.layers.1.attn.v_proj", load_file(base / "model.safetensors")
    rows, columns = weights[f"{name}.weight"].shape
    down, up = torch.randn(2, columns), torch.randn(rows, 2)
    others = {
        f"base_model.model.model.layers.0.attn.v_proj.lora_{part}.weight": value
        for part, value in (("A", down * 0), ("B", up * 0))
    }
    own = {
        f"base_model.model.{name}.lora_A.weight": down,
        f"base_model.model.{name}.lora_B.weight": up,
    }
    save_step({**others, **own}, run / "checkpoint", 1, alone=True)
    weights[f"{name}.weight"] += 3.0 * up @ down
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    with process_group():
        adapted, by_hand, plain = (
            our_lm(model).loglikelihood_rolling(requests("loglikelihood_rolling"))
            for model in (run, merged, base)
        )
    assert adapted == pytest.approx(by_hand, rel=1e-5)
    assert adapted != pytest.approx(plain, rel=1e-3)


def test_a_pad_token_behind_the_embedding_changes_no_answer(assets: Path, tmp_path: Path) -> None:
    model, pad = tmp_path / "padded", "<|pad|>"
    shutil.copytree(assets / "gated_deltanet", model)
    tokenizer = load_tokenizer(str(model))
    names = [f"<|{n}|>" for n in range(len(tokenizer), VOCABULARY)]
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(model)
    assert tokenizer.pad_token_id >= VOCABULARY
    asked = requests("generate_until")
    for number, request in enumerate(asked):
        # The name of the token in a text is text.
        request.arguments = (f"{pad} {number} {request.args[0]}", request.args[1])
    with process_group():
        padded, plain = (
            our_lm(folder, batch=8).generate_until(asked)
            for folder in (model, assets / "gated_deltanet")
        )
    assert padded == plain


def ranks_scores(model: Path, tasks: Path, placement: Placement, limit: int) -> dict[str, Any]:
    loaded = load_tasks(TaskOptions(NAMES, tasks))
    return evaluate_tasks(our_lm(model, placement), loaded, limit)


def figures(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {key}": value
        for task, scores in results.items()
        for key, value in scores.items()
        if "," in key and isinstance(value, float) and "_stderr" not in key
    }


def test_task_scores_are_those_of_the_stock_model(assets: Path) -> None:
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(TaskOptions(NAMES, assets / "tasks"))
    with process_group():
        ours = evaluate_tasks(our_lm(assets / "gated_deltanet"), loaded)
    theirs = evaluate(stock_lm(assets / "gated_deltanet"), loaded, bootstrap_iters=0)
    assert theirs is not None
    expected = figures(theirs["results"])
    assert len(expected) == 9
    assert figures(ours["results"]) == pytest.approx(expected, rel=1e-3)
    assert ours["versions"] == {name: 1.5 for name in NAMES}
    assert ours["n_samples"] == theirs["n-samples"]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fewer_documents_than_processes(assets: Path, size: int) -> None:
    """lm-eval's own distribution fails here: a rank without a document has no request."""
    with process_group():
        alone = ranks_scores(assets / "run", assets / "tasks", "whole", 1)
    for ours in run_distributed(ranks_scores, size, assets / "run", assets / "tasks", "sharded", 1):
        assert figures(ours["results"]) == pytest.approx(figures(alone["results"]), rel=1e-4)
        assert ours["task_hashes"] == alone["task_hashes"]
        assert (ours["world_size"], ours["sharded"]) == (size, True)


def test_what_a_score_depends_on_is_recorded(assets: Path) -> None:
    loaded = load_tasks(TaskOptions(("local_cloze",), assets / "tasks"))
    with process_group():
        found, again = (evaluate_tasks(our_lm(assets / "run"), loaded, 5) for _ in range(2))
    assert {key: value for key, value in found.items() if key in EXPECTED} == EXPECTED
    assert found["truncated"] == sum(
        len(load_tokenizer(str(assets / "run")).encode(f"{text} def f7(é):")) > LENGTH + 1
        for text in TEXTS[:5]
    )
    assert set(found["task_hashes"]) == {"local_cloze"} and again == found


EXPECTED = {
    "dtype": "float32",
    "adds_bos": False,
    "prefix_token": "<|endoftext|>",
    "max_length": LENGTH,
    "batch": 4,
    "world_size": 1,
    "sharded": False,
    "n_shot": {"local_cloze": 0},
    "versions": {"local_cloze": 1.5},
}


def test_table_shows_scores_with_their_errors() -> None:
    scores = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.0123, "sample_len": 3}
    other = {"em,strict": 0.25, "em_stderr,strict": "N/A", "ppl,none": 12345678.0}
    assert headline({"a": scores, "b": other}) == {
        "a acc": "0.5000 ±0.012",
        "b em (strict)": "0.2500",
        "b ppl": "1.235e+07",
    }


def test_requests_with_one_context_stay_together() -> None:
    from lm_eval.api.instance import Instance

    pairs = [("ab", "c"), ("", "xyz"), ("abcd", "e"), ("ab", "d"), ("", "q")]
    found = alike([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)])  # type: ignore[arg-type]
    assert found == [[2], [1], [0, 3], [4]]


def test_batches_hold_similar_lengths_within_both_bounds() -> None:
    items = ["a", "bbbb", "cc", "dddddddd", "ee", "f"]
    assert list(batches(items, len, 3, 8)) == [["dddddddd"], ["bbbb", "cc"], ["ee", "a", "f"]]
    assert list(batches(["x" * 9], len, 3, 8)) == [["x" * 9]]
    assert padded([(1, 2), (3,)], 0, left=True).tolist() == [[1, 2], [0, 3]]
    assert padded([(1, 2), (3,)], 9, left=False).tolist() == [[1, 2], [3, 9]]


def test_score_reads_the_last_logits() -> None:
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.25, 0.75], [0.5, 0.5]]))
    value, greedy = score(logits, [1, 0])
    assert value == pytest.approx(math.log(0.75 * 0.5)) and greedy
    assert score(logits, [0, 0])[1] is False


def test_placement_follows_memory(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.lm import network

    config = resolve(assets / "run").config
    monkeypatch.setattr(network, "world_size", lambda: 2)
    monkeypatch.setattr(network, "gather_objects", lambda value: [value, value])
    assert fits_whole(config, torch.float32)
    monkeypatch.setattr(network, "free_memory", lambda: 1000.0)
    assert not fits_whole(config, torch.float32)


def test_bfloat16_is_the_same_whole_and_sharded(assets: Path) -> None:
    found = []
    with process_group():
        for placement in ("whole", "sharded"):
            network = load_network(resolve(assets / "run"), torch.bfloat16, placement)  # type: ignore[arg-type]
            lm = SlimstateLM(network, load_tokenizer(str(assets / "run")), LENGTH)
            found.append(lm.loglikelihood_rolling(requests("loglikelihood_rolling")))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("a", "b" * 99), "than the 48 that the model is shown at once"),
        ("loglikelihood", ("a", ""), "a continuation without a token"),
        (
            "generate_until",
            ("a", {"max_gen_toks": 48}),
            "generates 48 tokens, and the model is sho",
        ),
    ],
)
def test_requests_that_do_not_fit_are_refused(
    assets: Path, kind: str, arguments: tuple, message: str
) -> None:
    from lm_eval.api.instance import Instance

    request = Instance(kind, {}, arguments, 0)  # type: ignore[arg-type]
    with process_group(), pytest.raises(UserError, match=message):
        getattr(our_lm(assets / "llama"), kind)([request])


def test_nan_scores_are_refused(assets: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(assets / "delta_net", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with process_group(), pytest.raises(NotFiniteError, match="not finite"):
        our_lm(broken).loglikelihood_rolling(requests("loglikelihood_rolling"))


def test_generation_ends_where_the_publisher_says(assets: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(assets / "delta_net", model)
    written = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**written, "eos_token_id": [5, 9]}))
    with process_group():
        network = load_network(resolve(model), torch.float32)
    assert network.model.generation_config.eos_token_id == [5, 9]  # type: ignore[union-attr]


def test_data_beside_the_task_file_is_found_from_anywhere(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_tasks(TaskOptions(("local_cloze",), assets / "tasks", num_fewshot=2))
    assert loaded["tasks"]["local_cloze"].get_config("num_fewshot") == 2


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (("local_rollin",), "texts.jsonl", "unknown task local_rollin: did you mean local_rolling"),
        (("local_x",), "gone.jsonl", "needs the file gone.jsonl or "),
        (("local_x",), "/gone/data.jsonl", "needs the file /gone/data.jsonl, which is not there"),
        (("local_hub",), "", "needs the data set some/data (part), and https://127.0.0.1:9"),
        (("local_bad",), "texts.jsonl", "task local_bad cannot"),
    ],
)
def test_missing_tasks_and_data_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    data: str,
    message: str,
) -> None:
    from launch.lm import task_data, tasks

    monkeypatch.setattr(task_data, "hub_problem", lambda: "https://127.0.0.1:9 cannot be reached")
    tasks_folder = write_tasks(tmp_path / "tasks")
    (tasks_folder / "x.yaml").write_text(task_file("x", TASKS["cloze"], data))
    (tasks_folder / "bad.yaml").write_text(task_file("bad", "output_type: nonsense"))
    hub = "task: local_hub\ndataset_path: some/data\ndataset_name: part\ntest_split: test\n"
    (tasks_folder / "hub.yaml").write_text(hub + TASKS["cloze"])
    if "rollin" in names[0]:
        indexed = tasks._indexed
        monkeypatch.setattr(tasks, "_indexed", lambda path, defaults: indexed(path, False))
    with pytest.raises(UserError) as error:
        load_tasks(TaskOptions(names, tasks_folder))
    assert message in str(error.value) and "\n" not in str(error.value)
    if "needs" in message:
        assert "dataset_kwargs.data_files" in str(error.value)
