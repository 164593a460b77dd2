"""What belongs to a model survives --init, pruning and conversion, and nothing else goes along."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flame.checkpoint.convert import convert
from flame.checkpoint.reference import resolve
from flame.convert import STAGE
from flame.hugging_face.companions import companions
from flame.hugging_face.model_card import is_model_card
from flame.models.slim_delta_net import CLASSES
from tests.flame.jobs import make_job, write_assets
from tests.pruning.models import DELTA_NET, GATED_DELTANET, weights, write_hf, write_run

BESIDE = {
    "generation_config.json": '{"eos_token_id": 7, "temperature": 0.3}',
    "chat_template.jinja": "{{ messages[0].content }}",
    "added_tokens.json": '{"<|tool|>": 300}',
    "tokenizer.model": "pieces",
    "LICENSE": "do what you like",
    "preprocessor_config.json": '{"size": 3}',
    "modeling_extra.py": "raise SystemExit",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
"""Files of a published model, by path."""

LEFT = {
    "eval.json": '{"kind": "eval", "versions": {}, "command": "slimstate eval"}',
    "pytorch_model.bin": "weights",
    "consolidated.safetensors": "weights",
    "train.log": "step 1",
    ".gitattributes": "*.safetensors filter=lfs",
}
"""What lies there too, and is of another model or no part of one."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model of 300 tokens, with all that such a folder may hold."""
    folder = tmp_path_factory.mktemp("companions")
    write_assets(folder)
    model = write_hf(folder / "model", GATED_DELTANET, weights(GATED_DELTANET))
    shutil.copytree(folder / "tokenizer", model, dirs_exist_ok=True)
    for name, text in {**BESIDE, **LEFT, "README.md": "# Theirs"}.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    return folder


def _start(home: Path, run: Path, **options: str) -> Path:
    """What training from the model writes into its run folder before the first step, and a step."""
    from flame.run_folder.prepare import prepare_run_folder

    job = make_job(home, run, model__config="", model__init=str(home / "model"), **options)
    prepare_run_folder(job)
    tensors = load_file(home / "model" / "model.safetensors")
    write_run(run.parent / "steps", GATED_DELTANET, tensors)
    shutil.move(run.parent / "steps" / "checkpoint", run)
    prepare_run_folder(job)
    return run


def _assert_beside(folder: Path) -> None:
    for name, text in BESIDE.items():
        assert (folder / name).read_text() == text, name
    assert not [name for name in LEFT if (folder / name).exists()]
    assert (folder / "README.source.md").read_text() == "# Theirs"


def test_everything_survives_training_pruning_and_export(home: Path, tmp_path: Path) -> None:
    from pruning import prune

    run = _start(home, tmp_path / "run", data__tokenizer="")
    _assert_beside(run)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run / name).read_bytes() == (home / "model" / name).read_bytes()
    for to in ("hf", "dcp"):
        arguments = [str(run), str(tmp_path / f"pruned-{to}"), "--to", to, "--method", "l1"]
        options = prune.STAGE.parse([*arguments, "--ratio", "0.5"])
        prune.check(options)
        prune.run(options)
        convert(tmp_path / f"pruned-{to}", tmp_path / f"export-{to}", "hf")
        _assert_beside(tmp_path / f"pruned-{to}")
        _assert_beside(tmp_path / f"export-{to}")
        plan = (tmp_path / f"pruned-{to}" / "plan.json").read_bytes()
        assert (tmp_path / f"export-{to}" / "plan.json").read_bytes() == plan
        card = (tmp_path / f"export-{to}" / "README.md").read_text()
        assert "method l1" in card and "ratio 0.5" in card and f"`pruned-{to}`" in card
        assert f"from_pretrained('export-{to}')" in card and "import fla" in card
        assert "import flame.register" in card, "what a machine without a GPU needs"
    assert is_model_card(tmp_path / "export-hf" / "README.md")


def test_another_tokenizer_takes_the_place_of_the_models(home: Path, tmp_path: Path) -> None:
    run = _start(home, tmp_path / "run", data__tokenizer=str(home / "tokenizer"))
    assert (run / "tokenizer.json").read_bytes() == (home / "tokenizer/tokenizer.json").read_bytes()
    assert (run / "generation_config.json").is_file() and (run / "LICENSE").is_file()
    for name in ("added_tokens.json", "tokenizer.model", "chat_template.jinja"):
        assert not (run / name).exists()


def test_convert_says_what_it_did(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    STAGE.main([str(home / "model"), str(tmp_path / "out"), "--to", "dcp"])
    bound, said = capsys.readouterr().out.splitlines()
    assert bound.startswith("rank 0 alone writes") and " in memory at most " in bound
    count = len(load_file(home / "model" / "model.safetensors"))
    assert said.startswith(f"{tmp_path / 'out'}: the folder `model` as a run folder with step 0")
    assert f"{count} tensors" in said and "generation_config.json" in said


def test_the_card_of_our_classes_names_their_import(tmp_path: Path) -> None:
    from pruning.adapters import adapter_for

    config_class = CLASSES[0]
    adapter = adapter_for(DELTA_NET)
    spaces = [space for space in adapter.spaces(DELTA_NET) if space.kind == "key"]
    widths = {space.name: (32, 16) for space in spaces}
    config = adapter.resize(DELTA_NET, widths)
    assert config["model_type"] == config_class.model_type
    write_run(tmp_path / "run", config, weights(config))
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "import flame.register" in card and "import fla\n" not in card


def test_a_plan_keeps_the_tensors_that_it_names(home: Path, tmp_path: Path) -> None:
    model = write_hf(tmp_path / "model", GATED_DELTANET, weights(GATED_DELTANET))
    (model / "plan.json").write_text(json.dumps({"replaced": {"file": "plan.tensors.safetensors"}}))
    (model / "plan.tensors.safetensors").write_bytes(b"tensors")
    convert(model, tmp_path / "out", "dcp")
    assert (tmp_path / "out" / "plan.tensors.safetensors").read_bytes() == b"tensors"


def test_files_have_the_mode_that_the_umask_gives(home: Path, tmp_path: Path) -> None:
    from pruning import calibrate

    out = tmp_path / "stats"
    data = ["--data", home / "text.jsonl", "--sequences", 1, "--seq-len", 64]
    options = calibrate.STAGE.parse([str(word) for word in (home / "model", out, *data)])
    before = os.umask(0o027)
    try:
        calibrate.run(options)
        convert(home / "model", tmp_path / "hf", "hf")
    finally:
        os.umask(before)
    files = [path for folder in (out, tmp_path / "hf") for path in folder.iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files if path.is_file()} == {0o640}


def test_a_tied_model_that_stores_its_head_alone_is_pruned_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from pruning import prune

    config = {**GATED_DELTANET, "tie_word_embeddings": True}
    tensors = weights(config)
    embedding = tensors.pop("model.embeddings.weight")
    model = write_hf(tmp_path / "model", config, tensors)
    options = prune.STAGE.parse(
        [str(model), str(tmp_path / "out"), "--method", "l1", "--ratio", "0.5"]
    )
    prune.run(options)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert (loaded.get_input_embeddings().weight == embedding).all()
    assert (loaded.get_output_embeddings().weight == embedding).all()


def test_companions_are_found_by_name_and_content(home: Path) -> None:
    names = {path.name for path in companions(resolve(home / "model").folder)}
    assert not names & {*LEFT, "README.md", "config.json", "model.safetensors"}
    assert {"LICENSE", "tokenizer.json", "additional_chat_templates"} <= names
