"""Bad input: one line that says what to do, a non-zero exit, and nothing written, whatever it is.

The commands are real, and so are the models, plans and data that they are given (bad_models.py).
Most run in this process. What the checks before work find is found with `--nproc 2` too, without a
worker; what a stage finds later is tried on two processes by the tests marked slow.
"""

import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flame.checkpoint.steps import whole_steps
from launch import cli
from launch.processes import launcher
from pruning.methods import METHODS
from tests.launch import bad_models as bad

ROOT = Path(__file__).parents[2]

DATA = "--data text.jsonl --sequences 4 --seq-len 64"

ON_MODEL = {
    "train": "train --config recipe.toml --init {model}",
    "resume": "train --config model/recipe.toml --training.steps 9",
    "calibrate": f"calibrate {{model}} out --methods drrqr {DATA}",
    "plan": "plan {model} out --method l1 --ratio 0.5",
    "apply": "apply {model} plan.json out",
    "prune": f"prune {{model}} out --method drrqr --ratio 0.5 {DATA}",
    "prune without data": "prune {model} out --method random --ratio 0.5",
    "convert": "convert {model} out --to hf",
    "eval": "eval {model} --perplexity text.jsonl --json out --seq-len 64 --max-sequences 3",
}
"""Command lines that work with a model in order; `resume` is about `model` alone."""

ON_OUTPUT = {
    "train": "train --config recipe.toml --init run --job.dump_folder {output}",
    "calibrate": f"calibrate hf {{output}} --methods drrqr {DATA}",
    "plan": "plan hf {output} --method l1 --ratio 0.5",
    "apply": "apply hf plan.json {output}",
    "prune": f"prune hf {{output}} --method drrqr --ratio 0.5 {DATA}",
    "convert": "convert hf {output} --to dcp",
    "eval": "eval hf --perplexity text.jsonl --json {output} --seq-len 64",
    "demo": "demo --out {output}",
}

ON_DATA = {
    "train": "train --config recipe.toml",
    "train on a stream": "train --config recipe.toml --data.streaming",
    "calibrate": "calibrate run out --methods drrqr --sequences 4 --seq-len 64",
    "prune": "prune run out --method drrqr --ratio 0.5 --sequences 4 --seq-len 64",
    "eval": "eval run --perplexity text.jsonl --json out --seq-len 64",
}

PRUNING = {"calibrate", "plan", "apply", "prune", "prune without data"}
EVERYONE = set(ON_MODEL)
STARTING = EVERYONE - {"resume"}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals") / "folder"
    bad.build(folder)
    return folder


@pytest.fixture
def folder(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of all artefacts, as the working directory; no hub."""
    import datasets
    from huggingface_hub import constants

    copy = tmp_path / "folder"
    shutil.copytree(originals, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    handlers, level = logging.root.handlers[:], logging.root.level
    yield copy
    logging.root.handlers[:], logging.root.level = handlers, level


@pytest.fixture
def refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must refuse, in this process; returns its one line."""

    def run(line: str) -> str:
        before = contents(folder)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(shlex.split(line))
        out, err = capfd.readouterr()
        assert end.value.code not in (0, None)
        return one_line(out, err, before, folder)

    return run


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, a command that goes beyond its checks fails the test."""

    def forbid() -> None:
        monkeypatch.setattr(launcher.Job, "run", lambda job: pytest.fail("work was started"))

    return forbid


def contents(folder: Path) -> dict[str, Any]:
    """What is in a folder: names, modes, and of files the time of change and the bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = (status.st_mtime_ns, path.read_bytes()) if path.is_file() else None
        found[str(path.relative_to(folder))] = status.st_mode, content
    return found


def one_line(out: str, err: str, before: dict[str, Any], folder: Path) -> str:
    """The one line on stderr, after a look that there is nothing else."""
    assert "Traceback" not in out
    assert re.fullmatch(r"slimstate: error: [^\n]+\n", err), err
    after = contents(folder)
    changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    assert changed == []
    return err.removeprefix("slimstate: error: ").strip()


def _matrix(faults: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(command, damage, says, late, id=f"{command}: {name}")
        for name, (damage, says, late, commands) in faults.items()
        for command in ON_MODEL
        if command in commands
    ]


READING = EVERYONE - {"apply"}
"""Commands that look at weights before they find that a plan is of others."""

MODEL_FAULTS = {
    "no config": (bad.no_config, r"model has no config\.json: a model is", False, STARTING),
    "config not JSON": (
        bad.config_is_not_json, r"model/config\.json is not JSON: .*line 1", False, EVERYONE,
    ),
    "unknown family": (
        bad.unknown_family, r"model family 'gated_deltanot': ", False, EVERYONE - {"convert"},
    ),
    "unknown family, converted": (
        bad.unknown_family, r"model family 'gated_deltanot': ", True, {"convert"},
    ),
    "tied widths": (
        bad.tied_widths,
        r"key channels of rwkv7 cannot be pruned: head_dim is both .*: use a family", False,
        PRUNING,
    ),
    "no tokenizer": (
        bad.no_tokenizer, r"no tokenizer.*: give (--tokenizer|data\.tokenizer)", False,
        {"calibrate", "prune", "eval"},
    ),
    "no .metadata": (bad.no_metadata, r"step-7 half-written or damaged", False, EVERYONE),
    "damaged .metadata": (
        bad.damaged_metadata, r"step-7/\.metadata is damaged \(its hash differs\): use another",
        True, EVERYONE,
    ),
    ".metadata of noise": (
        bad.metadata_of_noise, r"step-7/\.metadata is not a DCP index .*: use another step", True,
        EVERYONE,
    ),
    "hostile .metadata": (
        bad.hostile_metadata, r"step-7/\.metadata asks for posix\.mkdir, .*: do not use", True,
        EVERYONE,
    ),
    "hostile entry": (
        bad.hostile_entry, r"entry lr_scheduler\.last_epoch of the checkpoint is not plain data",
        True, {"resume", "apply", "prune", "prune without data"},
    ),
    "truncated shard": (
        bad.truncated_shard,
        r"step-7/__0_0\.distcp is damaged \(its hash differs\): use another step", True, EVERYONE,
    ),
    "NaN": (
        bad.nan_weights,
        r"model\.layers\.1\.mlp\.up_proj\.weight holds .*NaN or infinite values: choose a check",
        True, EVERYONE - {"convert", "plan"},
    ),
    "index of a missing file": (
        bad.missing_file_in_index, r"index\.json names two\.safetensors, which is missing: copy",
        True, STARTING,
    ),
    "cut safetensors": (
        bad.cut_safetensors, r"model/model\.safetensors is damaged .*: copy the model again", True,
        STARTING,
    ),
    "wrong shape": (
        bad.wrong_shape, r"q_proj\.weight has shape \(3, 3\), .*config\.json", True,
        STARTING - {"convert"},
    ),
}  # fmt: skip
"""What is wrong with a model, what the line says, whether only work finds it, and for whom.

Convert carries every bit over, NaN's too, and takes tensors of any shape. Calibration and plans do
not touch the training state, where the hostile entry is; plans look at the weights that they choose
by, and leave the others to `apply`.
"""


@pytest.mark.parametrize(("command", "damage", "says", "late"), _matrix(MODEL_FAULTS))
def test_model_is_refused(
    refused: Run, no_worker: Any, command: str, damage: Any, says: str, late: bool
) -> None:
    damage()
    line = ON_MODEL[command].format(model="model")
    assert re.search(says, refused(line))
    if not late:
        no_worker()
        assert re.search(says, refused(f"{line} --nproc 2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "damage", "says", "late"), [p for p in _matrix(MODEL_FAULTS) if p.values[3]]
)
def test_model_is_refused_by_two_processes(
    refused: Run, command: str, damage: Any, says: str, late: bool
) -> None:
    damage()
    assert re.search(says, refused(f"{ON_MODEL[command].format(model='model')} --nproc 2"))


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("command", sorted(STARTING))
def test_missing_model(refused: Run, no_worker: Any, command: str, nproc: int) -> None:
    no_worker()
    for name, says in {
        "./nowhere": "no model at ./nowhere: no such folder",
        "some/model": "no model some/model: no such folder, and not to be had from the hub "
        "(http://127.0.0.1:9 cannot be reached from here); give a local folder",
    }.items():
        line = f"{ON_MODEL[command].format(model=name)} --nproc {nproc}"
        assert refused(line) == says


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "nan", "half", "''"])
@pytest.mark.parametrize(
    "command", ["plan hf out --method l1", f"prune hf out --method drrqr {DATA}", "demo --out out"]
)
def test_ratio(refused: Run, no_worker: Any, command: str, ratio: str) -> None:
    no_worker()
    for nproc in (1, 2):
        line = refused(f"{command} --ratio {ratio} --nproc {nproc}")
        assert re.search(rf"ratio.*{ratio}", line) and re.search(r"0 and 1|float value", line)


@pytest.mark.parametrize(
    "command",
    [
        "plan hf out --ratio 0.5 --method magic",
        f"prune hf out --ratio 0.5 --method magic {DATA}",
        f"calibrate hf out --methods drrqr,magic {DATA}",
    ],
)
def test_unknown_method(refused: Run, no_worker: Any, command: str) -> None:
    no_worker()
    for nproc in (1, 2):
        line = refused(f"{command} --nproc {nproc}")
        assert line == f"unknown method 'magic': choose from {', '.join(METHODS)}"


def _first_head(change: Callable[[list[int]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda plan: change(plan["spaces"]["layers.0.key"][0])


PLAN_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "duplicate": (
        _first_head(lambda row: row.__setitem__(1, row[0])),
        r"layers\.0\.key, head 0: channel \d+ occurs twice",
    ),
    "out of range": (
        _first_head(lambda row: row.__setitem__(-1, 32)),
        r"layers\.0\.key, head 0: kept channels \d+\.\.32 leave the range 0\.\.31",
    ),
    "negative": (
        _first_head(lambda row: row.__setitem__(0, -1)),
        r"layers\.0\.key, head 0: -1 is not a channel's number",
    ),
    "unsorted": (_first_head(lambda row: row.reverse()), r"list them in order"),
    "one head short": (
        _first_head(lambda row: row.pop()),
        r"was edited: its config_after does not follow from its spaces: make a new plan",
    ),
    "unknown space": (
        lambda plan: plan["spaces"].update({"layers.9.key": plan["spaces"].pop("layers.1.key")}),
        r"no space 'layers\.9\.key': it has layers\.0\.key to layers\.1\.value-head",
    ),
    "newer version": (
        lambda plan: plan.update(format=2),
        r"its format is 2, this slimstate reads up to 1: install a newer slimstate",
    ),
    "edited config": (
        lambda plan: plan["config_after"].update(head_dim=8),
        r"was edited: its config_after does not follow from its spaces",
    ),
}


@pytest.mark.parametrize(("change", "says"), PLAN_EDITS.values(), ids=PLAN_EDITS)
def test_edited_plan(refused: Run, no_worker: Any, change: Any, says: str) -> None:
    bad.edit_json(Path("plan.json"), change)
    no_worker()
    for nproc in (1, 2):
        line = refused(f"apply hf plan.json out --nproc {nproc}")
        assert line.startswith("plan plan.json") and re.search(says, line)


def test_plan_of_another_model(refused: Run) -> None:
    says = "apply it to the model that it was made from, or make a new plan"
    for model, difference in {
        "deeper": "num_hidden_layers 2 there, 3 here",
        "other": r"fingerprint \w{12}, this model's is \w{12}",
    }.items():
        line = refused(f"apply {model} plan.json out")
        assert re.fullmatch(rf"plan plan.json is of another model \({difference}\): {says}", line)


@pytest.mark.parametrize(
    "command",
    [
        "plan other out --method drrqr --ratio 0.5 --stats stats",
        "prune other out --method drrqr --ratio 0.5 --stats stats",
    ],
)
def test_statistics_of_another_model(refused: Run, command: str) -> None:
    assert re.search(r"stats has statistics of another model .*: calibrate", refused(command))


@pytest.mark.parametrize("command", sorted(ON_OUTPUT))
def test_output(refused: Run, no_worker: Any, folder: Path, command: str) -> None:
    Path("locked").mkdir(mode=0o555)
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    no_worker()
    expected = {
        "locked/out": r"locked is read-only for this user",
        "locked/sub/out": r"locked is read-only for this user",
        "taken": r"taken (exists|is not empty|is a folder).*: (choose|give)",
        "config.json": r"config\.json (exists|is a file): choose",
        "config.json/out": r"config\.json is not a folder",
    }
    if command != "demo":
        source = "run" if command == "train" else "hf"
        inside = rf"lies inside the model's folder \S+/{source}: choose another"
        expected |= {
            source: rf"{inside}|is a folder: give the name of a file|run has done 7 steps",
            f"{source}/new/out": inside,
        }
    for output, says in expected.items():
        line = ON_OUTPUT[command].format(output=output)
        for words in (line, f"{line} --nproc 2"):
            assert re.search(says, refused(words)), words


def test_output_is_never_the_model(refused: Run, no_worker: Any) -> None:
    no_worker()
    for command in ("calibrate", "apply", "prune", "convert"):
        for output in ("hf", "."):
            line = refused(f"{ON_OUTPUT[command].format(output=output)} --overwrite")
            assert re.search(r"(inside|replace) the model", line)
    for command in ("plan", "eval"):
        line = refused(f"{ON_OUTPUT[command].format(output='.')} --overwrite")
        assert line.endswith("is a folder: give the name of a file")


@pytest.mark.skipif(os.geteuid() > 0, reason="mounting needs root")
def test_read_only_mount(refused: Run, folder: Path) -> None:
    mount = folder / "mount"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", mount])
    if done.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        line = refused("prune hf mount/out --method random --ratio 0.5")
    finally:
        subprocess.run(["umount", mount], check=True)
    assert line.endswith("mount is read-only for this user")


@pytest.mark.skipif(os.geteuid() > 0, reason="mounting needs root")
@pytest.mark.parametrize("command", ["train", "calibrate", "apply", "prune", "convert"])
def test_full_disk(refused: Run, folder: Path, command: str, monkeypatch: Any) -> None:
    mount = folder / "mount"
    mount.mkdir()
    # Large enough for the folders and a small file, and too small for a model.
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", mount])
    if done.returncode:
        pytest.skip("this machine lets nobody mount")
    # The check of the free space beforehand would find it: another job may fill the disk later.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e15, 0, 1e15))
    try:
        line = refused(ON_OUTPUT[command].format(output="mount/out"))
    finally:
        subprocess.run(["umount", mount], check=True)
    assert "No space left on device" in line


@pytest.mark.parametrize("command", sorted(ON_DATA))
def test_corpus_without_text(refused: Run, no_worker: Any, command: str) -> None:
    bad.no_text()
    no_worker()
    for nproc in (1, 2):
        line = refused(f"{ON_DATA[command]} --nproc {nproc}")
        assert "text.jsonl (train) has no text" in line


@pytest.mark.parametrize("command", sorted(set(ON_DATA) - {"eval"}))
def test_corpus_too_short(refused: Run, no_worker: Any, command: str) -> None:
    bad.little_text()
    no_worker()
    says = r"text\.jsonl \(train\) is shorter than one global batch of 4 sequences .*; give more"
    if command in ("calibrate", "prune"):
        says = r"--sequences 4 of --seq-len 64 are too many: in text\.jsonl \(train\), .* ask for"
    for nproc in (1, 2):
        assert re.search(says, refused(f"{ON_DATA[command]} --nproc {nproc}"))


@pytest.mark.parametrize("command", ["train", "calibrate", "prune", "eval"])
def test_token_ids_beyond_the_vocabulary(refused: Run, no_worker: Any, command: str) -> None:
    for path in (Path("config.json"), Path("run/config.json")):
        bad.edit_json(path, lambda config: config.update(vocab_size=100))
    no_worker()
    for nproc in (1, 2):
        line = refused(f"{ON_DATA[command]} --nproc {nproc}")
        assert re.search(r"ids up to 299, beyond the model's vocabulary of 100: use", line)


HUB = {
    "train --config recipe.toml --data.dataset some/text": "data set 'some/text'",
    "train --config recipe.toml --data.tokenizer some/model": "tokenizer 'some/model'",
    "train --config recipe.toml --model.config some/model": "model.config 'some/model'",
    "calibrate hf out --methods drrqr --data some/text": "data set 'some/text'",
    f"calibrate hf out --methods drrqr {DATA} --tokenizer some/model": "tokenizer 'some/model'",
    "prune hf out --method drrqr --ratio 0.5 --data some/text": "data set 'some/text'",
    "eval hf --perplexity some/text --json out": "data set 'some/text'",
    "eval hf --perplexity text.jsonl --tokenizer some/model": "tokenizer 'some/model'",
}
"""Hub names of data, tokenizers and configs; test_missing_model has those of models."""


@pytest.mark.parametrize(("command", "names"), HUB.items(), ids=HUB)
def test_hub_name_without_a_network(refused: Run, no_worker: Any, command: str, names: str) -> None:
    no_worker()
    for nproc in (1, 2):
        line = refused(f"{command} --nproc {nproc}")
        assert names in line and "http://127.0.0.1:9 cannot be reached from here" in line


def test_no_tokenizer_to_train_with(refused: Run, no_worker: Any) -> None:
    bad.no_tokenizer()
    no_worker()
    line = refused("train --config recipe.toml --data.tokenizer '' --init model --nproc 2")
    assert line == "no tokenizer: give data.tokenizer (a folder or a hub name)"


@pytest.mark.parametrize("command", ["train", "calibrate", "prune"])
def test_more_processes_than_virtual_shards(refused: Run, no_worker: Any, command: str) -> None:
    no_worker()
    line = refused(f"{ON_DATA[command]} --nproc 8")
    assert re.search(r"more processes than virtual shards: 8 .* 4 shards; start fewer", line)


@pytest.mark.parametrize("command", sorted(ON_OUTPUT))
def test_process_count(refused: Run, no_worker: Any, command: str) -> None:
    no_worker()
    for count in ("0", "-1", "two"):
        line = refused(f"{ON_OUTPUT[command].format(output='out')} --nproc {count}")
        assert line == f"--nproc: {count} is not a whole number of at least 1"


def slimstate(line: str, **options: Any) -> subprocess.Popen[str]:
    """A command as a person starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *shlex.split(line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


PIPES = {
    "recipe.toml": "train --config recipe.toml",
    "model/config.json": ON_MODEL["convert"],
    "model/recipe.toml": ON_MODEL["calibrate"],
    "model/tokenizer.json": ON_MODEL["calibrate"],
    "model/tokenizer_config.json": ON_MODEL["calibrate"],
    "model/checkpoint/step-7/.metadata": ON_MODEL["convert"],
    "model/checkpoint/step-7/checksums.json": ON_MODEL["convert"],
    "model/checkpoint/step-7/__0_0.distcp": ON_MODEL["convert"],
    "hf/model.safetensors": ON_OUTPUT["convert"].format(output="out"),
    "hf/config.json": ON_OUTPUT["convert"].format(output="out"),
    "hf/generation_config.json": "eval hf --perplexity text.jsonl --seq-len 64",
    "plan.json": ON_OUTPUT["apply"].format(output="out"),
    "text.jsonl": ON_DATA["calibrate"],
    "result.json": "eval hf --perplexity text.jsonl --json result.json --seq-len 64",
    "out.toml": "sweep hf out --methods l1 --ratios 0.5 --recover out.toml",
    "stats/meta.json": "plan hf out --method drrqr --ratio 0.5 --stats stats",
    "adapter/adapter_config.json": "convert adapter out --to hf",
    "adapter/adapter_model.safetensors": "convert adapter out --to hf",
}
"""Files in whose place a pipe waits for a writer who never comes, and who reads them."""


QUICK = ("recipe.toml", "text.jsonl", "hf/model.safetensors")


@pytest.mark.parametrize(
    "file", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in PIPES]
)
def test_nobody_waits_for_a_pipe_in_the_place_of_a_file(
    folder: Path, capfd: pytest.CaptureFixture[str], file: str
) -> None:
    """It is refused in one line, or taken for a file that is not there."""
    path = Path(file)
    path.parent.mkdir(exist_ok=True)
    if path.parent.name == "adapter":
        (path.parent / "adapter_config.json").write_text('{"base_model_name_or_path": "hf"}')
        (path.parent / "adapter_model.safetensors").write_bytes(b"")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for a writer"))
    signal.alarm(60)
    try:
        cli.main(shlex.split(PIPES[file].format(model="model")))
    except SystemExit as end:
        said = capfd.readouterr().err
        assert end.code == 1 and re.fullmatch(r"slimstate: error: [^\n]+\n", said)
    finally:
        signal.alarm(0)


DISAGREEING = {
    "calibrate model out --methods drrqr --sequences 4 --seq-len 64": (
        bad.hostile_metadata,
        "asks for posix.mkdir",
    ),
    "eval model --perplexity text.jsonl --json out --seq-len 64": (
        bad.nan_weights,
        "holds 1 NaN or infinite values",
    ),
}
"""Where ranks could disagree, or wait for each other for ever."""


@pytest.mark.parametrize(("line", "damage", "says"), [(k, *v) for k, v in DISAGREEING.items()])
@pytest.mark.slow
def test_two_processes(refused: Run, line: str, damage: Any, says: str) -> None:
    damage()
    assert says in refused(f"{line} --nproc 2")


def test_as_a_person_starts_it(folder: Path) -> None:
    bad.truncated_shard()
    before = contents(folder)
    process = slimstate("train --config model/recipe.toml --training.steps 9 --nproc 2")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "__0_0.distcp is damaged" in one_line(out, err, before, folder)


def test_second_job_on_one_output_is_refused(refused: Run, folder: Path) -> None:
    from flame.process.atomic_output import writer_lock

    for command in ("train", "apply", "convert"):
        with writer_lock(folder / "out"):
            line = refused(ON_OUTPUT[command].format(output="out"))
        assert re.fullmatch(r"another job is writing \S*out: wait for it to end", line)


LONG = {
    "train": "train --config recipe.toml --training.steps 100000 --checkpoint.interval 100000",
    "prune": "prune run out --method drrqr --ratio 0.5 --sequences 99999 --seq-len 16",
}


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("command", LONG)
def test_interrupt(folder: Path, command: str, nproc: int) -> None:
    bad.write_documents(["x = 1\n" * 2000] * 400)
    before = contents(folder)
    process = slimstate(f"{LONG[command]} --nproc {nproc}")
    wait_until(lambda: started(command))
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    left = set(contents(folder)) - set(before)
    assert not [name for name in left if "tmp" in name or "lock" in name]
    # Training saves the step in hand, and nothing else of it is left.
    assert len(whole_steps(Path("out/checkpoint"))) == (command == "train")
    assert command == "train" or not left


@pytest.mark.slow
def test_killed_worker(folder: Path) -> None:
    process = slimstate(f"{LONG['train']} --nproc 2")
    wait_until(lambda: started("train"))
    time.sleep(3)
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        err == "slimstate: error: rank 1 was ended by SIGKILL: the machine may be out of memory\n"
    )
    assert not [name for name in os.listdir() if "lock" in name or "tmp" in name]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_worker_alone_saves(folder: Path, rank: int) -> None:
    process = slimstate(f"{LONG['train']} --nproc 2")
    wait_until(lambda: started("train"))
    time.sleep(6)
    os.kill(workers_of(process.pid)[rank], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, "")
    assert len(list(Path("out/checkpoint").glob("step-*"))) == 1
    assert not [name for name in os.listdir() if "lock" in name or "tmp" in name]


def started(command: str) -> bool:
    return Path("out/recipe.toml" if command == "train" else ".out.slimstate.tmp").exists()


def workers_of(pid: int) -> list[int]:
    """The workers that a launcher has started, by rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        values = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((v.split(b"=")[1] for v in values if v.startswith(b"RANK=")), None)
        if rank is not None:
            ranks[int(rank)] = child
    return [ranks[rank] for rank in sorted(ranks)]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)


def test_all_is_well_without_faults(folder: Path) -> None:
    """So the refusals above are of the faults."""
    for line in (*ON_MODEL.values(), *ON_DATA.values()):
        if line != ON_MODEL["resume"]:
            cli.main(shlex.split(line.format(model="model")))
            Path("out").rename(f"out of {line.replace('/', ' ')[:40]}{time.monotonic()}")
