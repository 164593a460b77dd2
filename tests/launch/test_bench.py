"""Benchmarks: every measure of both families, ratios of medians, one line for each mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flame.errors import UserError
from launch import bench
from launch.bench import STAGE, check, model_names, run
from launch.speed.bench_table import bench_table, cell, delta_kernels, ratio_of
from launch.speed.kernel_trace import operators_of
from launch.speed.peak_memory import peak_bytes
from launch.speed.timing import Spread, take_turns
from pruning.adapters import adapter_for
from tests.pruning.models import FAMILIES, weights, write_hf

CPU = torch.device("cpu")
QUICK = [
    "--lengths", "16,80", "--batch-sizes", "1,2", "--decode-length", "2", "--prompt-length", "4",
    "--train-batch", "1", "--train-length", "16", "--repeats", "3",
]  # fmt: skip
NAMES = {
    "parameters", "state_bytes", "cache_bytes", "prefill", "prefill_peak_bytes", "decode",
    "decode_latency", "mixer", "mixer_backward", "train_step", "train_peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both families, and each of them with half the key channels."""
    root = tmp_path_factory.mktemp("bench")
    for family, config in FAMILIES.items():
        keys = [space for space in adapter_for(config).spaces(config) if space.kind == "key"]
        half = adapter_for(config).resize(config, {s.name: (16,) * s.num_heads for s in keys})
        write_hf(root / family, config, weights(config))
        write_hf(root / f"{family}_half", half, weights(half))
    return root


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_measure_of_a_family_beside_its_half(
    folders: Path, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, half = tmp_path / "bench.json", f"{family}_half"
    options = STAGE.parse([str(folders / half), "--against", str(folders / family), *QUICK])
    options = bench.replace(options, json=file)
    check(options)
    run(options)
    record = json.loads(file.read_text())
    assert record["kind"] == "bench" and record["format"] == 1 and record["against"] == family
    assert list(record["models"]) == [half, family]
    measures = record["measures"]
    assert {measure["name"] for measure in measures} == NAMES
    for measure in measures:
        assert set(measure["values"]) == {half, family}
        for value in measure["values"].values():
            assert 0 < value["min"] <= value["median"] <= value["max"]
            assert len(value["runs"]) in (1, 3)
        medians = [measure["values"][name]["median"] for name in (half, family)]
        assert measure["ratio"] == pytest.approx(medians[0] / medians[1])
    by_name = {measure["name"]: measure for measure in measures}
    state = by_name["state_bytes"]["values"]
    assert state[family]["median"] == adapter_for(FAMILIES[family]).state_bytes(FAMILIES[family])
    assert by_name["state_bytes"]["ratio"] == 16 / FAMILIES[family].get("head_dim", 32)
    assert 0.4 < by_name["cache_bytes"]["ratio"] < 0.8
    assert [m["length"] for m in measures if m["name"] == "prefill"] == [16, 80]
    assert [m["batch_size"] for m in measures if m["name"] == "decode"] == [1, 2]
    kernels = record["models"][family]["kernels"]
    assert "chunk" in delta_kernels(kernels["prefill"])
    assert "fused_recurrent" in delta_kernels(kernels["decode"])
    printed = capsys.readouterr().out
    assert f"{half} ÷ {family}" in printed and "this project's PyTorch operators" in printed
    assert printed.count("Decoding as a CUDA graph is missing: CUDA graphs need a GPU.") == 1


def test_one_model_has_no_ratios_and_a_softmax_model_no_state(tmp_path: Path) -> None:
    from tests.flame.tiny import LLAMA, build, stored_tensors

    tensors = {n: t for n, t in stored_tensors(build(LLAMA)).items() if n != "lm_head.weight"}
    write_hf(tmp_path / "llama", LLAMA, tensors)
    options = STAGE.parse([str(tmp_path / "llama"), *QUICK, "--measure", "mixer,decode"])
    from flame.checkpoint.reference import resolve

    record = bench.benchmark({"llama": resolve(options.models[0])}, None, options)
    found = {measure["name"]: measure["values"] for measure in record["measures"]}
    assert set(found) == {"parameters", "state_bytes", "cache_bytes", "decode", "decode_latency"}
    assert found["state_bytes"] == {} and found["cache_bytes"]["llama"]["median"] == 2 * 4 * 8 * 4
    assert all(measure["ratio"] is None for measure in record["measures"])
    text = bench_table(record).text()
    assert "÷" not in text and "recurrent state a sequence" in text


def test_first_round_does_not_count_and_actions_take_turns() -> None:
    turns: list[str] = []
    clocks = {"a": iter([90.0, 3.0, 1.0, 2.0]), "b": iter([80.0, 6.0, 6.0, 7.0])}

    def action(name: str) -> float:
        turns.append(name)
        return next(clocks[name])

    found = take_turns({name: lambda name=name: action(name) for name in clocks}, 3)
    assert found == {"a": [3.0, 1.0, 2.0], "b": [6.0, 6.0, 7.0]}
    assert turns == ["a", "b"] * 4
    spread = Spread.rates(12, found["a"])
    assert (spread.median, spread.least, spread.most) == (6.0, 4.0, 12.0)
    assert Spread.milliseconds([2.0], parts=4).runs == (500.0,)


def test_ratio_is_of_medians_and_missing_where_one_is() -> None:
    values = {"new": {"median": 3.0}, "old": {"median": 4.0}}
    assert ratio_of({"values": values}, "old") == 0.75
    assert ratio_of({"values": values}, None) is None
    assert ratio_of({"values": {"old": {"median": 4.0}}}, "old") is None
    runs = {"median": 1234.5, "min": 0.25, "max": 150.21, "runs": [1, 2]}
    assert cell(runs, "ms") == "1,234 [0.25–150.2]"
    assert cell({"median": 1536}, "bytes") == "1.5 KiB"


def test_peak_counts_what_is_alive_together() -> None:
    size = 1000 * 4

    def action() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        view = second.view(10, 100)
        third = view * 2
        third.add_(1)

    assert peak_bytes(action, CPU) == 2 * size
    kept = torch.ones(1000)
    assert peak_bytes(lambda: kept.add_(1), CPU) == 0


def test_training_peak_holds_activations_for_backward() -> None:
    layers = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 1))
    inputs = torch.ones(100, 8)

    def forward() -> Any:
        with torch.no_grad():
            return layers(inputs)

    held = peak_bytes(lambda: layers(inputs).sum().backward(), CPU)
    layers.zero_grad()
    assert held > peak_bytes(forward, CPU) + 100 * 64 * 4


def test_operators_are_those_that_other_code_calls() -> None:
    from kernels.gated_delta_rule import chunk_gated_delta_rule

    q = torch.randn(1, 70, 2, 4)
    ran = operators_of(
        lambda: chunk_gated_delta_rule(q, q, q, torch.zeros(1, 70, 2), torch.ones(1, 70, 2))
    )
    assert ran[0] == "gated_delta_rule.chunk_gated_delta_rule"
    assert operators_of(lambda: q + 1) == []
    triton = ["triton: l2norm_fwd_kernel", "triton: chunk_gated_delta_rule_fwd_kernel_h"]
    assert delta_kernels(triton) == "fla's Triton kernels (chunk_gated_delta_rule_fwd_kernel_h)"
    assert delta_kernels([]) == "no delta-rule operator"
    own = ["norms.l2norm_fwd", "kda.chunk_kda", "gated_delta_product.chunk_gated_delta_product"]
    assert delta_kernels(own) == f"this project's PyTorch operators ({', '.join(own[1:])})"


def test_models_are_named_by_what_tells_them_apart() -> None:
    assert model_names(["runs/a"]) == {"a": "runs/a"}
    assert model_names(["x/pruned", "x/dense"]) == {"pruned": "x/pruned", "dense": "x/dense"}
    assert list(model_names(["one/dense", "two/dense"])) == ["one/dense", "two/dense"]
    assert model_names(["m", "m", "m"]) == {"m": "m", "m (again)": "m", "m (again 2)": "m"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "16,0"], "--lengths: 0 is not a whole number of at least 1"),
        (["--batch-sizes", "a"], "--batch-sizes: a is not a whole number"),
        (["--repeats", "0"], "--repeats: 0 is not a whole number of at least 1"),
        (["--train-length", "-1"], "--train-length: -1 is not a whole number of at least 1"),
        (["--measure", "prefil"], "--measure: unknown 'prefil': choose from prefill, decode"),
        (["--measure", ""], "--measure names nothing: choose from prefill"),
        (["--seed", "-1"], "--seed: -1 is not a whole number of at least 0"),
        (["--against", "/no/such"], "no model at /no/such: no such folder"),
        (["--json", "{model}/out.json"], "lies inside the model's folder"),
        (["--json", "{exists}"], "exists: choose another, or pass --overwrite"),
    ],
)
def test_mistakes_are_one_line(
    folders: Path, arguments: list[str], message: str, tmp_path: Path
) -> None:
    model, exists = folders / "delta_net", tmp_path / "there.json"
    exists.write_text("mine")
    with pytest.raises(UserError) as error:
        check(STAGE.parse([str(model), *(a.format(model=model, exists=exists) for a in arguments)]))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert exists.read_text() == "mine"


def test_several_processes_are_refused(folders: Path) -> None:
    with pytest.raises(UserError, match="--nproc 2: bench measures one device"):
        check(STAGE.parse([str(folders / "delta_net")]), world_size=2)
