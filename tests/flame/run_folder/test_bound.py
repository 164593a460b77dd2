"""Going on with a run: what it is bound to, what may change, what a refusal leaves alone."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.errors import UserError
from tests.distributed import run_distributed
from tests.flame.jobs import TINY, make_job, scalars_of, tensors_of, train_job


@pytest.fixture(scope="module")
def run(two_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the undisturbed run of 6 steps, so moved."""
    return shutil.copytree(two_ranks, tmp_path_factory.mktemp("moved") / "run")


@pytest.fixture(scope="module")
def others(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Inputs by what they are: those of the run under other names, and different ones."""
    from flame.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("others")
    found = {name: str(folder / name) for name in ("config", "same.json", "other.json")}
    shutil.copyfile(assets / "config.json", found["same.json"])
    (folder / "other.json").write_text(json.dumps(TINY | {"num_hidden_layers": 3}))
    shutil.copytree(assets / "tokenizer", folder / "same_tokenizer")
    texts = [json.loads(line)["text"] for line in (assets / "text.jsonl").open()]
    train_tokenizer([text.upper() for text in texts], 300, folder / "other_tokenizer")
    shutil.copyfile(assets / "text.jsonl", folder / "same.jsonl")
    with (folder / "other.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": text.replace("f", "g")}) + "\n" for text in texts)
    return {path.name: str(path) for path in folder.iterdir()} | {"missing": str(folder / "none")}


def check(assets: Path, run: Path, **overrides: Any) -> None:
    from flame.training.job_checks import check_job

    check_job(make_job(assets, run, **overrides), 1)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model__config", "other.json", "num_hidden_layers is 3, not 2"),
        ("model__config", "missing", "neither a file nor a folder"),
        ("data__tokenizer", "other_tokenizer", "another tokenizer"),
        ("data__tokenizer", "missing", "does not exist"),
        ("data__dataset", "other.jsonl", "other text than the run's"),
        ("training__seq_len", 32, "training.seq_len 32 is given, and the run has 64"),
        ("training__steps", 5, "has done 6 steps and training.steps is 5"),
        ("data__virtual_shards", 8, "data.virtual_shards 8"),
        ("data__seed", 3, "data.seed 3"),
        ("data__add_eos", False, "data.add_eos False"),
        ("trainable__modules", [".attn."], "trainable.modules"),
        ("model__init", "RUN", "did not start from"),
    ],
)
def test_another_model_or_text_is_refused_by_name(
    assets: Path, run: Path, others: dict[str, str], two_ranks: Path, key: str, value: Any,
    words: str,
) -> None:  # fmt: skip
    given = str(two_ranks) if value == "RUN" else others.get(str(value), value)
    options: dict[str, Any] = {"lr_scheduler__total_steps": None} if key.endswith("__steps") else {}
    with pytest.raises(UserError, match=words):
        check(assets, run, **{key: given}, **options)


def test_the_same_elsewhere_passes(assets: Path, run: Path, others: dict[str, str]) -> None:
    same = {"data__tokenizer": "same_tokenizer", "data__dataset": "same.jsonl"}
    check(assets, run, **{key: others[name] for key, name in same.items()})
    check(assets, run, model__config=others["same.json"])


def test_a_change_is_recorded_with_its_step(assets: Path, run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "run")
    options = {
        "training__steps": 7,
        "lr_scheduler__total_steps": 7,
        "training__global_batch_size": 4,
        "optimizer__lr": 1e-3,
    }
    run_distributed(train_job, 1, assets, again, **options)
    changes = json.loads((again / "run.json").read_text())["changes"]
    assert {(c["step"], c["key"], c["from"], c["to"]) for c in changes} == {
        (6, "training.steps", 6, 7),
        (6, "lr_scheduler.total_steps", 6, 7),
        (6, "training.global_batch_size", 8, 4),
        (6, "optimizer.lr", 3e-3, 1e-3),
    }
    # Tokens are counted as they were trained on, at both batches.
    assert scalars_of(again, "n_tokens_seen")[7] == (6 * 8 + 4) * 64


def test_a_start_is_known_again(assets: Path, run: Path, tmp_path: Path) -> None:
    from flame.checkpoint.convert import convert

    start, other = tmp_path / "start", tmp_path / "other"
    convert(str(run), start, "hf")
    convert(str(run / "checkpoint/step-3"), other, "hf")
    mine, given = tmp_path / "run", {"model__init": str(start), "training__steps": 1}
    run_distributed(train_job, 1, assets, mine, **given)
    check(assets, mine, **given)
    moved = shutil.move(start, tmp_path / "moved")
    check(assets, mine, **given | {"model__init": str(moved)})
    check(assets, mine, **given)
    with pytest.raises(UserError, match="exists, and started from .*start, not from"):
        check(assets, mine, **given | {"model__init": str(other)})


# A refusal changes nothing ---------------------------------------------------------------------


def content_of(run: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(run)): path for path in sorted(run.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


def finished(assets: Path, run: Path) -> list[str]:
    """Train a run that has all its steps; return what the log says of it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flame.train").addHandler(handler)
    try:
        train_job(assets, run, optimizer__lr=1.0)
    finally:
        logging.getLogger("flame.train").removeHandler(handler)
    return said


def test_a_finished_run_says_so_and_stays_as_it_is(assets: Path, run: Path) -> None:
    before = content_of(run)
    (said,) = run_distributed(finished, 1, assets, run)[0]
    assert "is finished: it has all 6 steps" in said
    assert content_of(run) == before


def state_of(step: Path) -> dict[str, Any]:
    from flame.checkpoint.dcp_source import DcpSource

    return {**tensors_of(step), **DcpSource(step, everything=True).values()}


def replaced(name: str, value: Any) -> Any:
    def change(state: dict[str, Any], position: dict[str, Any]) -> None:
        where = position if name in position else state
        assert name in where, name
        if value is None:
            del where[name]
        else:
            where[name] = value

    return change


def cursor(value: Any) -> Any:
    def change(state: dict[str, Any], position: dict[str, Any]) -> None:
        position["shards"]["1"] = value

    return change


MOMENT = "optimizer.state.lm_head.weight.exp_avg"
DAMAGES = {
    "step is text": replaced("train_state.step", "six"),
    "step is below 0": replaced("train_state.step", -1),
    "tokens are a list": replaced("train_state.ntokens_seen", [1]),
    "skipped steps are a truth value": replaced("train_state.skipped_steps", True),
    "schedule is text": replaced("lr_scheduler.last_epoch", "6"),
    "schedule is missing": replaced("lr_scheduler.last_epoch", None),
    "a moment is text": replaced(MOMENT, "text"),
    "a moment has another shape": replaced(MOMENT, torch.zeros(3)),
    "a moment is of whole numbers": replaced(MOMENT, torch.zeros(300, 32, dtype=torch.int64)),
    "a moment is missing": replaced(MOMENT, None),
    "a weight is text": replaced("lm_head.weight", "text"),
    "a group is a tensor": replaced("optimizer.param_groups.lm_head.weight.lr", torch.zeros(2)),
    "shards are a list": replaced("shards", []),
    "shards are missing": replaced("shards", None),
    "next sequence is text": replaced("next_sequence", "48"),
    "next sequence is below 0": replaced("next_sequence", -3),
    "next sequence is missing": replaced("next_sequence", None),
    "a cursor is empty": cursor([]),
    "a cursor is text": cursor("abc"),
    "a cursor has text": cursor([0, "1", 2]),
    "a cursor is below 0": cursor([0, -1, 2]),
    "a cursor has four numbers": cursor([0, 1, 2, 3]),
    "a cursor is of two sources": cursor([[0, 1, 2], [0, 1, 2]]),
    "a cursor is null": cursor(None),
    "a cursor is far beyond the text": cursor([0, 10**9, 0]),
}


def refusals(assets: Path, run: Path, names: list[str]) -> dict[str, tuple[str, bool]]:
    """The error of each damage, and whether the run folder is as before."""
    from flame.checkpoint.save import save_step

    step = run / "checkpoint/step-6"
    state, position = state_of(step), json.loads((step / "dataloader.json").read_text())
    found = {}
    for name in names:
        change = DAMAGES[name]
        other, there = dict(state), copy.deepcopy(position)
        change(other, there)
        files = {"dataloader.json": json.dumps(there).encode()}
        save_step(other, run / "checkpoint", 6, files, alone=True)
        before, said = content_of(run), ""
        try:
            train_job(assets, run, training__steps=7, lr_scheduler__total_steps=7)
        except UserError as error:
            said = str(error)
        except Exception as error:  # noqa: BLE001
            said = f"TRACEBACK {type(error).__name__}: {error}"
        found[name] = (said, content_of(run) == before)
        shutil.rmtree(run / "checkpoint/step-7", ignore_errors=True)
    return found


SOME = ["step is text", "a moment is text", "a cursor has text"]


@pytest.mark.parametrize(
    "names", [SOME, pytest.param([*DAMAGES], marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_step_of_wrong_types_is_one_line_and_changes_nothing(
    assets: Path, run: Path, tmp_path: Path, names: list[str]
) -> None:
    again = shutil.copytree(run, tmp_path / "run")
    (found,) = run_distributed(refusals, 1, assets, again, names)
    wrong = {
        name: (said[:200], same)
        for name, (said, same) in found.items()
        if not same or not said or said.startswith("TRACEBACK") or "\n" in said or len(said) > 400
    }
    assert wrong == {}
