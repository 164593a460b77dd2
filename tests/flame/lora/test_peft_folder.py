"""A peft folder names a base that loads, and says how both are loaded."""

import json
from pathlib import Path

import pytest
import torch

from flame.checkpoint.convert import convert
from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from tests.flame.lora.adapter_kinds import UNTIED, lora, save_adapters
from tests.flame.lora.test_merging import adapters_on
from tests.flame.tiny import build, stored_tensors, write_hf_folder, write_run

TOKENS = torch.arange(40)[None] % 67


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """Adapters that were trained on a step of a run."""
    base = write_run(tmp_path / "base", UNTIED, stored_tensors(build(UNTIED)))
    folder = save_adapters(tmp_path / "made", lora(), build(UNTIED))
    return adapters_on(base / "checkpoint/step-3", folder)


def with_fingerprint(adapters: Path) -> None:
    from flame.checkpoint.fingerprint import fingerprint

    base = resolve(adapters).base()
    record = {"reference": str(base.weights), "fingerprint": fingerprint(UNTIED, base.source())}
    (adapters / "base.json").write_text(json.dumps(record))


def test_a_base_that_peft_cannot_load_is_refused_with_the_way_out(
    adapters: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"step-3, which transformers .* --to hf`, and give --base"):
        convert(adapters, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_the_base_may_be_named(
    adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines that the command prints are run, and compute what the adapters were made for."""
    from flame.convert import STAGE, check, run

    expected = load_model(resolve(adapters))(TOKENS).logits
    with_fingerprint(adapters)
    convert(tmp_path / "base", tmp_path / "hf", "hf")
    arguments = [str(adapters), str(tmp_path / "out"), "--to", "peft"]
    options = STAGE.parse([*arguments, "--base", str(tmp_path / "hf")])
    check(options)
    run(options)
    said = capsys.readouterr().out.rpartition("load both: ")[2]
    names: dict[str, torch.nn.Module] = {}
    exec(said, names)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    assert resolve(tmp_path / "out").base().folder == tmp_path / "hf"


def test_another_base_is_refused_by_name(adapters: Path, tmp_path: Path) -> None:
    with_fingerprint(adapters)
    other = write_hf_folder(tmp_path / "other", UNTIED, stored_tensors(build(UNTIED, seed=1)))
    with pytest.raises(UserError, match="other is not the model that the adapters"):
        convert(adapters, tmp_path / "out", "peft", base=str(other))
    convert(adapters, tmp_path / "out", "peft", base="someone/model")
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "someone/model"


def test_only_a_peft_folder_has_a_base_to_name(adapters: Path, tmp_path: Path) -> None:
    from flame.convert import STAGE, check

    with pytest.raises(UserError, match="--base is for --to peft"):
        check(STAGE.parse([str(adapters), str(tmp_path / "x"), "--to", "hf", "--base", "y"]))
