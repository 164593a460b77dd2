"""Calibration: sums that depend on neither processes nor interruptions, in bounded memory."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.process.atomic_output import writer_lock
from pruning import calibrate, plan
from pruning.calibration.data import CalibrationData, calibration_data
from pruning.calibration.stats_file import META_FILE, SUMS_FILE, read_meta
from pruning.methods import METHODS
from pruning.op_call import OpCall
from pruning.options import DataOptions
from pruning.planning.plan_file import read_plan
from pruning.spaces import Space
from pruning.statistics import Source, Statistic
from pruning.taps import tap_ops
from tests.distributed import run_distributed
from tests.pruning.models import (
    FAMILIES,
    GATED_DELTANET,
    select_from_whole_matrix,
    weights,
    write_hf,
    write_run,
    write_text,
)

SEQUENCES = 6
"""Not a multiple of 4: on four processes, two have nothing in the last round."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, its tokenizer, and a model of each family without one."""
    folder = tmp_path_factory.mktemp("calibrate")
    write_text(folder)
    for family, config in FAMILIES.items():
        write_hf(folder / family, config, weights(config))
    return folder


def data_arguments(home: Path, **changes: Any) -> list[str]:
    values = {
        "data": home / "text.jsonl",
        "tokenizer": home / "tokenizer",
        "sequences": SEQUENCES,
        "seq-len": 80,
        **changes,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def run_calibrate(home: Path, family: str, out: Path, *flags: str, **changes: Any) -> None:
    stage(str(home / family), str(out), *flags, *data_arguments(home, **changes))


def stage(*arguments: str) -> None:
    """Run `calibrate` as one of the processes of its job."""
    from flame.process.distributed import world_size

    options = calibrate.STAGE.parse(list(arguments))
    calibrate.check(options, world_size())
    calibrate.run(options)


def run_plans(home: Path, family: str, stats: Path, out: Path) -> dict[str, bytes]:
    """The plans of every method that looks at data, in the first kind of space that it serves."""
    return {
        name: run_plan(home, family, stats, out / f"{name}.json", name, "--space", kind.kinds[0])
        for name, kind in METHODS.items()
        if kind.needs
    }


def load_plan_tensors(folder: Path) -> dict[str, Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def run_plan(
    home: Path, family: str, stats: Path, out: Path, method: str = "drrqr", *flags: str
) -> bytes:
    arguments = [str(home / family), str(out), "--stats", str(stats), "--method", method]
    options = plan.STAGE.parse([*arguments, "--ratio", "0.5", *flags])
    plan.check(options)
    plan.run(options)
    return out.read_bytes()


def whole_matrices(home: Path, family: str) -> dict[str, list[Tensor]]:
    """Every query and key of the calibration, kept: by space, a matrix [2 tokens, d] per head."""
    from flame.checkpoint.load import load_model
    from pruning.adapters import adapter_for

    reference = resolve(home / family)
    model = load_model(reference)
    options = DataOptions(
        data=str(home / "text.jsonl"),
        tokenizer=str(home / "tokenizer"),
        sequences=SEQUENCES,
        seq_len=80,
    )
    calls: dict[int, list[Tensor]] = {}

    def keep(call: OpCall) -> None:
        calls.setdefault(call.layer, []).append(torch.cat([call.q, call.k], dim=1)[0])

    loader = calibration_data(reference, options).loader(0, 1)
    with torch.no_grad(), tap_ops(model, adapter_for(reference.config), keep):
        for _, (inputs, _labels) in zip(range(SEQUENCES), loader, strict=False):
            model(inputs["input"], cu_seqlens=inputs["cu_seqlens"], use_cache=False)
    loader.close()
    return {
        f"layers.{layer}.key": list(torch.cat(rows).transpose(0, 1))
        for layer, rows in calls.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_the_same_at_every_world_size_and_that_of_the_whole_matrix(
    family: str, home: Path, tmp_path: Path
) -> None:
    plans = {}
    for world_size in (1, 2, 4):
        stats = tmp_path / f"stats-{world_size}"
        run_distributed(run_calibrate, world_size, home, family, stats)
        plans[world_size] = run_plan(home, family, stats, tmp_path / f"plan-{world_size}.json")
        assert read_meta(stats).tokens == SEQUENCES * 80
    assert plans[1] == plans[2] == plans[4]
    kept = read_plan(tmp_path / "plan-1.json").kept
    matrices = whole_matrices(home, family)
    assert kept.keys() == matrices.keys()
    for space, of_heads in matrices.items():
        expected = [select_from_whole_matrix(matrix, 16) for matrix in of_heads]
        assert [row.tolist() for row in kept[space]] == expected, space


def test_sums_in_pieces_lead_to_the_plan_of_float64_at_every_world_size(
    home: Path, tmp_path: Path
) -> None:
    family, found = next(iter(FAMILIES)), {}
    for world_size, products in ((1, "float64"), (1, "pieces"), (2, "pieces")):
        stats = tmp_path / f"{products}-{world_size}"
        pieces = ("--gram-products", products)
        run_distributed(run_calibrate, world_size, home, family, stats, *pieces)
        found[stats.name] = run_plan(home, family, stats, tmp_path / f"{stats.name}.json")
    names = ("float64-1", "pieces-1")
    sums = [load_file(tmp_path / name / "statistics.safetensors") for name in names]
    assert any(not torch.equal(total, sums[1][name]) for name, total in sums[0].items())
    assert len(set(found.values())) == 1


def cut_short(home: Path, out: Path, sequences_before: int) -> None:
    """A calibration that dies after some sequences, as a kill between two saves would leave it."""
    from pruning.calibration import collect

    ran = 0
    run = collect.run_batch

    def dying(*arguments: Any) -> None:
        nonlocal ran
        ran += 1
        if ran > sequences_before:
            raise KeyboardInterrupt
        run(*arguments)

    collect.run_batch = dying
    try:
        run_calibrate(home, "delta_net", out, "--save-every", "4", sequences=18)
    except KeyboardInterrupt:
        return
    finally:
        collect.run_batch = run
    raise AssertionError("it was not cut short")


def test_a_calibration_cut_short_resumes_at_another_world_size(home: Path, tmp_path: Path) -> None:
    whole, stats = tmp_path / "whole", tmp_path / "stats"
    run_calibrate(home, "delta_net", whole, sequences=18)
    run_distributed(cut_short, 2, home, stats, 6)
    # Saves are after multiples of the 8 virtual shards: the 12 that ran come to 8.
    assert (read_meta(stats).sequences, read_meta(stats).wanted) == (8, 18)
    assert len(list(stats.glob("gradient-*"))) > 0
    with pytest.raises(UserError, match="holds 8 of 18 sequences: finish it with .*--resume"):
        run_plan(home, "delta_net", stats, tmp_path / "early.json")
    again = r"holds 8 of 18 sequences of a calibration that was cut short: pass --resume"
    with pytest.raises(UserError, match=again):
        run_calibrate(home, "delta_net", stats, sequences=18)
    with pytest.raises(UserError, match="begun with wanted 18, not 20: resume it with the"):
        run_calibrate(home, "delta_net", stats, "--resume", sequences=20)
    run_distributed(run_calibrate, 4, home, "delta_net", stats, "--resume", sequences=18)
    assert not list(stats.glob("gradient-*"))
    for folder in ("plans", "resumed"):
        (tmp_path / folder).mkdir()
    plans = run_plans(home, "delta_net", whole, tmp_path / "plans")
    resumed = run_plans(home, "delta_net", stats, tmp_path / "resumed")
    # Projections are equal, but for the last digits, which their file's hash shows.
    projected = [load_plan_tensors(tmp_path / folder) for folder in ("plans", "resumed")]
    torch.testing.assert_close(*projected, rtol=1e-9, atol=1e-10)
    hashes = [json.loads(made.pop("pca"))["replaced"]["hash"] for made in (plans, resumed)]
    assert all(hashes) and resumed == plans
    one, other = read_meta(whole), read_meta(stats)
    assert dataclasses.replace(one, cursor={}) == dataclasses.replace(other, cursor={})
    with pytest.raises(UserError, match="is complete: there is nothing to resume"):
        run_calibrate(home, "delta_net", stats, "--resume", sequences=18)


def calibration_memory(home: Path, sequences: int) -> tuple[int, int, int]:
    """Bytes of the statistics, of the process after a quarter of the sequences, and its most."""
    from pruning.calibration import collect

    resident: list[int] = []
    run = collect.run_batch

    def watched(*arguments: Any) -> None:
        run(*arguments)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))

    options = DataOptions(
        data=str(home / "text.jsonl"), tokenizer=str(home / "tokenizer"), seq_len=128
    )
    reference = resolve(home / "gated_deltanet")
    data = dataclasses.replace(calibration_data(reference, options), sequences=sequences)
    data = dataclasses.replace(data, config=dataclasses.replace(data.config, repeat=True))
    collect.run_batch = watched
    try:
        kinds = calibrate.kinds_of(("drrqr",), reference.config)
        collected, meta = collect.collect(reference, kinds, data, "")
    finally:
        collect.run_batch = run
    assert meta.tokens == 128 * sequences == 128 * len(resident)
    statistics = [kind for of_space in collected.values() for kind in of_space.values()]
    sums = [total for statistic in statistics for total in statistic.state_dict().values()]
    return sum(total.nbytes for total in sums), resident[sequences // 4], max(resident)


def test_memory_does_not_grow_with_the_number_of_tokens(home: Path) -> None:
    [(size, quarter, most)] = run_distributed(calibration_memory, 1, home, 240)
    heads, layers, d = 2, 2, 32
    # Of all rows, and of a sample of 5,000 of them.
    assert size == 2 * layers * (heads * d * d * 8 + 8)
    # Queries and keys of the last 180 sequences would be 180 * 128 tokens * 2 * 64 * 4 bytes a
    # layer, 24 MB in all.
    assert most - quarter < 6e6, f"memory grew by {(most - quarter) / 1e6:.1f} MB"


def write_bad_model(home: Path, name: str, tensor: str, value: float) -> Path:
    tensors = weights(GATED_DELTANET)
    tensors[tensor].view(-1)[3] = value
    return write_hf(home / name, GATED_DELTANET, tensors)


def complaint(call: Any, *arguments: Any, **named: Any) -> str:
    try:
        call(*arguments, **named)
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def test_activations_that_overflow_are_named_on_every_rank(home: Path, tmp_path: Path) -> None:
    write_bad_model(home, "huge", "model.layers.1.attn.k_proj.weight", 3e38)
    stats = tmp_path / "stats"
    texts = run_distributed(complaint, 2, run_calibrate, home, "huge", stats)
    named = "layer 1, calibration sequence 1: k holds a NaN or an infinity at the tap of the delta"
    assert all(named in text for text in texts), texts
    assert not list(tmp_path.iterdir())


def test_gradients_that_overflow_are_named_on_every_rank(home: Path, tmp_path: Path) -> None:
    write_bad_model(home, "steep", "lm_head.weight", 3e38)
    stats, flags = tmp_path / "stats", ("--methods", "taylor", "--save-every", "8")
    texts = run_distributed(complaint, 2, run_calibrate, home, "steep", stats, *flags)
    named = "layer 0, calibration sequences 1 to 2: the gradient of model.layers.0.attn."
    assert all(named in text and "holds a NaN or an infinity" in text for text in texts), texts
    # Without a backward pass nothing is wrong with it.
    run_calibrate(home, "steep", stats, "--methods", "drrqr,wanda,pca,jrnp,activation-norm")


def test_states_that_overflow_are_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pruning.calibration import feeding

    def overflowing(*_: Any) -> list[Tensor]:
        return [torch.full((1, 4, 32, 24), torch.inf)]

    monkeypatch.setattr(feeding, "sampled_states", overflowing)
    flags = ("--methods", "jrnp")
    text = complaint(run_calibrate, home, "gated_deltanet", tmp_path / "stats", *flags)
    assert "layer 0, calibration sequence 1: a recurrent state holds a NaN or an inf" in text
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named_before_the_model_runs(
    home: Path, tmp_path: Path
) -> None:
    write_bad_model(home, "broken", "model.layers.0.mlp.up_proj.weight", float("nan"))
    texts = run_distributed(complaint, 2, run_calibrate, home, "broken", tmp_path / "stats")
    assert all("model.layers.0.mlp.up_proj.weight holds 1 NaN" in text for text in texts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (("--methods", "drrqr,best"), {}, "unknown method 'best': choose from drrqr"),
        (("--methods", "l1"), {}, "l1 needs no statistics: there is nothing to calibrate"),
        ((), {"sequences": 10000}, "--sequences 10000 of --seq-len 80 are too many: in "),
        (
            (),
            {"sequences": 16, "seq-len": 90000},
            "16 sequences (the default) of --seq-len 90000 are too many: in ",
        ),
        ((), {"sequences": 0}, "--sequences: 0 is not a whole number of at least 1"),
        ((), {"seq-len": "x"}, "--seq-len: x is not a whole number of at least 1"),
        ((), {"data": "/no/where"}, "/no/where"),
        ((), {"tokenizer": "/no/where"}, "/no/where does not exist"),
        (("--resume",), {}, "no statistics at"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    flags: tuple[str, ...], changes: dict, message: str, home: Path, tmp_path: Path
) -> None:
    text = complaint(run_calibrate, home, "delta_net", tmp_path / "stats", *flags, **changes)
    assert message in text
    assert "\n" not in text
    assert not list(tmp_path.iterdir())


def test_a_second_job_on_one_output_is_refused_before_it_works(home: Path, tmp_path: Path) -> None:
    def another(stats: Path, *flags: str) -> str:
        with writer_lock(stats):
            return complaint(run_calibrate, home, "delta_net", stats, *flags)

    stats = tmp_path / "stats"
    assert "another job is writing" in another(stats)
    assert "another job is writing" in another(stats, "--save-every", "8", "--overwrite")
    assert not list(tmp_path.iterdir())


def test_a_stream_that_is_too_short_is_refused_on_every_rank(home: Path, tmp_path: Path) -> None:
    recipe = f'[data]\ndataset = "{home / "text.jsonl"}"\nstreaming = true\n'
    config = FAMILIES["delta_net"]
    run = write_run(home / "streaming", config, weights(config), recipe=recipe)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run / name).write_bytes((home / "tokenizer" / name).read_bytes())
    arguments = [str(run), str(tmp_path / "stats"), "--seq-len", "512", "--sequences", "400"]
    texts = run_distributed(complaint, 2, stage, *arguments)
    assert all("--sequences 400 of --seq-len 512 are too many" in text for text in texts), texts
    assert not list(tmp_path.iterdir())


@dataclass
class HiddenSum(Statistic):
    """What enters the mixers, summed: the smallest statistic of another source."""

    source: ClassVar[Source] = Source.MIXER_INPUT

    total: Tensor
    tokens: Tensor

    @classmethod
    def zeros(
        cls, space: Space, hidden_size: int = 0, device: torch.device | str = "cpu"
    ) -> "HiddenSum":
        total = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        return cls(total, torch.zeros((), dtype=torch.int64, device=device))

    def update(self, seen: Tensor) -> None:
        self.total += seen.double().sum(0)
        self.tokens += len(seen)


def collect_sums(home: Path) -> dict[str, Tensor]:
    """By space, the sums of two statistics of different sources, one after the other."""
    from pruning.calibration.collect import collect
    from pruning.statistics import QueryKeyGram

    reference = resolve(home / "delta_net")
    options = DataOptions(
        data=str(home / "text.jsonl"), tokenizer=str(home / "tokenizer"), sequences=5, seq_len=80
    )
    data = calibration_data(reference, options)
    collected, _ = collect(reference, (QueryKeyGram, HiddenSum), data, "")
    assert all(int(s.tokens) == 400 for of in collected.values() for s in of.values())
    return {
        name: torch.cat([total.double().flatten() for s in of.values() for total in _sums_of(s)])
        for name, of in collected.items()
        if of
    }


def _sums_of(statistic: Statistic) -> list[Tensor]:
    return list(statistic.state_dict().values())


def test_statistics_of_several_sources_add_up_over_ranks(home: Path) -> None:
    [one] = run_distributed(collect_sums, 1, home)
    for other in run_distributed(collect_sums, 4, home):
        assert other.keys() == one.keys()
        for name, sums in other.items():
            torch.testing.assert_close(sums, one[name], rtol=1e-12, atol=1e-9)


def test_data_and_tokenizer_must_come_from_somewhere(home: Path, tmp_path: Path) -> None:
    arguments = [str(home / "delta_net"), str(tmp_path / "stats")]
    text = complaint(calibrate.check, calibrate.STAGE.parse(arguments))
    assert text.endswith("has no recipe that names its training data: give --data or --recipe")
    options = calibrate.STAGE.parse([*arguments, "--data", str(home / "text.jsonl")])
    assert "has no tokenizer, and calibration reads text: give --token" in complaint(
        calibrate.check, options
    )
    options = calibrate.STAGE.parse([*arguments, *data_arguments(home)])
    assert "3 processes do not divide 8 virtual shards" in complaint(calibrate.check, options, 3)
    assert "more processes than virtual shards" in complaint(calibrate.check, options, 16)


def test_few_tokens_are_warned_of(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_calibrate(home, "delta_net", tmp_path / "s", sequences=1, **{"seq-len": 20})
    assert "20 calibration tokens for 32 key channels a head: the Gram matrix of" in caplog.text
    assert "the choice among the channels beyond its rank is arbitrary: give more" in caplog.text


def test_the_recipe_says_what_the_options_do_not(tmp_path: Path) -> None:
    recipe = '[data]\ndataset = "python-stdlib"\nvirtual_shards = 4\nsplit = "heldout"\n'
    recipe += "[training]\nseq_len = 96\n"
    run = write_run(tmp_path / "run", GATED_DELTANET, weights(GATED_DELTANET), recipe=recipe)
    (run / "tokenizer.json").write_text("{}")
    reference = resolve(run)
    found = calibration_data(reference, DataOptions())
    assert (found.config.dataset, found.config.split, found.seq_len) == (
        "python-stdlib", "heldout", 96,
    )  # fmt: skip
    assert (found.config.virtual_shards, found.config.seed, found.tokenizer) == (4, 42, str(run))
    other = calibration_data(reference, DataOptions(data="text.jsonl", seq_len=8, seed=1))
    assert (other.config.dataset, other.config.split, other.seq_len) == ("text.jsonl", "train", 8)
    assert (other.config.virtual_shards, other.config.seed) == (4, 1)
    (run / "recipe.toml").write_text("[data]\ncorpus = 1\n")
    with pytest.raises(UserError, match="recipe key data.corpus is unknown"):
        calibration_data(reference, DataOptions())
    (run / "recipe.toml").write_text("[data\n")
    with pytest.raises(UserError, match="recipe .* is not TOML"):
        calibration_data(reference, DataOptions())


def test_statistics_that_do_not_serve_are_refused(home: Path, tmp_path: Path) -> None:
    stats, plan = tmp_path / "stats", tmp_path / "plan.json"
    run_calibrate(home, "delta_net", stats, sequences=2)
    other = weights(FAMILIES["delta_net"], seed=1)
    write_hf(home / "other", FAMILIES["delta_net"], other)
    assert "has statistics of another model" in complaint(run_plan, home, "other", stats, plan)
    meta = json.loads((stats / META_FILE).read_text())
    changes = {
        "format": (3, "statistics of format 3, this slimstate reads up to 2"),
        "statistics": (["Other"], "drrqr needs QueryKeyGram"),
        "sequences": (1, "holds 1 of 2 sequences"),
        "tokens": ("many", "tokens is 'many', not a whole number"),
        "cursor": ([], "cursor is a list, not a table"),
    }
    for key, (value, message) in changes.items():
        (stats / META_FILE).write_text(json.dumps({**meta, key: value}))
        assert message in complaint(run_plan, home, "delta_net", stats, plan)
    (stats / META_FILE).write_text(json.dumps(meta))
    sums = bytearray((stats / SUMS_FILE).read_bytes())
    sums[-1] ^= 1
    (stats / SUMS_FILE).write_bytes(sums)
    assert "is damaged (its hash differs)" in complaint(run_plan, home, "delta_net", stats, plan)
    assert "no statistics at" in complaint(run_plan, home, "delta_net", tmp_path / "none", plan)
    assert not plan.exists()


def test_data_records_what_it_was() -> None:
    from flame.data.config import DataConfig

    config = DataConfig(dataset="some/set", subset="part", seed=3, tokenizer="t")
    record = CalibrationData(config, "t", 4, 8).record()
    assert (record["dataset"], record["subset"], record["split"]) == ("some/set", "part", "train")
    assert not {"seed", "tokenizer", "heldout"} & record.keys()
