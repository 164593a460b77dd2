"""Requests and traffic on a GPU, and the command that prints them."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from launch import capacity, cli
from launch.serving.capacity import Capacity, Server, contexts
from launch.serving.footprint import Experts, Footprint, KeyValues
from tests.launch.serving.published import PUBLISHED

MODEL = Footprint(
    parameters=1000,
    dense=600,
    experts=(Experts(4, 1, 300),),
    state=50,
    state_rows=5,
    conv=10,
    key_values=(KeyValues(4), KeyValues(2, window=8)),
    indexed=False,
)


def test_bytes_requests_and_traffic() -> None:
    one = Capacity(MODEL, Server(memory=10_000, slots=3, weight="float8", state="float32"))
    assert (one.weights, one.state, one.conv) == (1000, 200, 20)
    assert (one.kv(1), one.kv(8), one.kv(100)) == (12, 96, 2 * (400 + 16))
    assert Capacity(MODEL, Server(memory=1, state="int8")).state == 50 + 5 * 4
    assert one.request(100) == 3 * 220 + 832
    assert one.requests(100) == 9000 // 1492
    assert one.traffic(1, 100) == 600 + 75 + 440 + 832
    assert one.traffic(2, 100) == pytest.approx((600 + 300 * 7 / 16) / 2 + 440 + 832)
    assert Capacity(MODEL, Server(memory=900, weight="float8")).requests(100) == 0


def test_contexts_reach_the_longest() -> None:
    assert contexts(1000) == [256, 512, 1024]
    assert contexts(100) == [256]


def _config(folder: Path, name: str, **changes: Any) -> str:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(PUBLISHED[name][0] | changes))
    return str(file)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = _config(tmp_path, "Qwen3.5-27B")
    (tmp_path / "square").mkdir()
    square = json.loads(Path(dense).read_text()) | {
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    }
    (tmp_path / "square" / "config.json").write_text(json.dumps(square))
    pruned, plot, file = (str(tmp_path / name) for name in ("square", "plot.svg", "figures.json"))
    words = [pruned, "--against", dense, "--weight-dtype", "float8", "--plot", plot, "--json", file]
    cli.main(["capacity", *words])
    assert re.search(r"requests of 4,096 tokens.*114 +48 +2\.375", capsys.readouterr().out)
    measures = {
        row["name"]: row["values"] for row in json.loads(Path(file).read_text())["measures"]
    }
    assert measures["state_bytes"][dense] == 4 * measures["state_bytes"][pruned] == 48 * 48 * 2**16
    assert measures["conv_bytes"][dense] == 2 * measures["conv_bytes"][pruned]
    text = "".join(ElementTree.parse(plot).getroot().itertext())
    assert "square" in text and "Qwen3.5-27B" in text and "context, tokens" in text


def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["capacity", _config(tmp_path, "Qwen3.5-27B"), "--gpu-memory", "24"])
    said = capsys.readouterr().out
    assert "50.1 GiB" in said and "do not fit" in said
    assert re.search(r"requests of 4,096 tokens on one GPU +0\n", said)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--against", "MODEL"], "the model itself"),
        (["--state-dtype", "float7"], "float32"),
        (["--gpu-memory", "0"], "between 0"),
        (["--plot", "plot.png"], r"\.svg"),
        (["--against", "nowhere/at/all"], "nowhere/at/all"),
        (["--plot", "plot.svg", "--gpu-memory", "1"], "no room"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = _config(tmp_path, "Qwen3.5-0.8B")
    given = [word.replace("MODEL", model) for word in words]
    with pytest.raises(SystemExit) as end:
        cli.main(["capacity", model, *given])
    assert end.value.code == 1
    assert re.fullmatch(rf"slimstate: error: [^\n]*{expected}[^\n]*\n", capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == [Path(model).name]


def test_options_have_the_defaults_that_the_help_names() -> None:
    server = capacity.Options("model").server
    assert (server.memory, server.slots) == (80 * 2**30 * 0.9, 5)
