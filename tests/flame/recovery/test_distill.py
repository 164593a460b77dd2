"""Recovery modes with and without a teacher: the same update at every world size; the teacher."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.errors import UserError
from tests.distributed import run_distributed
from tests.flame.jobs import TINY, make_job, tensors_of, train_job

LORA = {"lora__rank": 4, "lora__alpha": 8.0}
DISTIL = {"distill__temperature": 2.0, "distill__weight": 1.0}
MODES: dict[str, dict[str, Any]] = {
    "lora": {**LORA, **DISTIL, "distill__hidden_weight": 0.5},
    "dora": {**LORA, **DISTIL, "lora__dora": True},
    "full": {**DISTIL, "distill__ce_weight": 0.5, "distill__chunk_tokens": 50},
    "partial": {"trainable__modules": ["layers.1.attn", "lm_head"]},
}
"""Together: each way of training, with a teacher and without, and each part of the loss."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the tests' model with weights of its own."""
    from tests.flame.tiny import build, stored_tensors, write_hf_folder

    torch.manual_seed(3)
    model = build(TINY, seed=3)
    tensors = {name: tensor * 0.2 for name, tensor in stored_tensors(model).items()}
    return write_hf_folder(tmp_path_factory.mktemp("teacher") / "hf", TINY, tensors)


def options_of(mode: str, init: Path, teacher: Path) -> dict[str, Any]:
    options = {**MODES[mode], "model__init": str(init), "metrics__enable_tensorboard": False}
    if "distill__weight" in options:
        options["distill__teacher"] = str(teacher)
    return options


def gradients_of_modes(
    assets: Path, out: Path, jobs: dict[str, dict[str, Any]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Full gradients of the first global batch and the loss's parts, by mode and name."""
    return {
        mode: first_gradients(make_job(assets, out / mode, **options))
        for mode, options in jobs.items()
    }


def first_gradients(job: Any) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import DTensor

    from flame.model import copy_full
    from flame.training.trainer import Trainer

    job.training.max_norm = 1e9
    trainer = Trainer(job)
    trainer.step = 1
    trainer.optimizers.step = lambda *_: None
    # As initialised, B is zero and would hide every gradient of A.
    for name, parameter in trainer.model_parts[0].named_parameters():
        if ".lora_B." in name:
            generator = torch.Generator().manual_seed(len(name))
            copy_full(parameter, torch.randn(parameter.shape, generator=generator) / 10)
    trainer.train_step(trainer.next_batches())
    trainer.reader.read()
    found = {"losses": torch.tensor(trainer.reader.figures.losses)}
    for name, parameter in trainer.model_parts[0].named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad
            found[name] = whole.full_tensor() if isinstance(whole, DTensor) else whole.clone()
    trainer.close()
    return found


@pytest.fixture(scope="module")
def one_process(
    assets: Path, two_ranks: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    jobs = {mode: options_of(mode, two_ranks, teacher) for mode in MODES}
    out = tmp_path_factory.mktemp("one")
    return run_distributed(gradients_of_modes, 1, assets, out, jobs)[0]


@pytest.mark.parametrize(
    ("world_size", "replicas"), [(2, 1), pytest.param(4, 1, marks=pytest.mark.slow), (4, 2)]
)
def test_every_mode_has_the_gradients_of_one_process(
    assets: Path,
    two_ranks: Path,
    teacher: Path,
    one_process: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
    world_size: int,
    replicas: int,
) -> None:
    mesh = {"parallelism__data_parallel_replicate_degree": replicas}
    jobs = {mode: {**options_of(mode, two_ranks, teacher), **mesh} for mode in MODES}
    for found in run_distributed(gradients_of_modes, world_size, assets, tmp_path, jobs):
        for mode, expected in one_process.items():
            assert found[mode].keys() == expected.keys()
            for name, value in expected.items():
                scale = float(value.abs().max())
                assert scale > 0, (mode, name)
                torch.testing.assert_close(
                    found[mode][name], value, rtol=1e-4, atol=1e-5 * scale + 1e-9
                )


def test_the_parts_of_the_loss_are_there_where_they_are_asked_for(
    one_process: dict[str, dict[str, torch.Tensor]],
) -> None:
    for mode, options in MODES.items():
        total, entropy, kl, hidden = one_process[mode]["losses"].tolist()
        weights = {name.removeprefix("distill__"): value for name, value in options.items()}
        assert (kl > 0) == ("weight" in weights)
        assert (hidden > 0) == ("hidden_weight" in weights)
        expected = weights.get("ce_weight", 1.0) * entropy + weights.get("weight", 0.0) * kl
        assert total == pytest.approx(expected + weights.get("hidden_weight", 0.0) * hidden)
        assert 2 < entropy < 8


def test_only_named_modules_have_gradients(
    one_process: dict[str, dict[str, torch.Tensor]],
) -> None:
    names = set(one_process["partial"]) - {"losses"}
    assert names and all("layers.1.attn" in name or "lm_head" in name for name in names)
    assert any(name.endswith("A_log") for name in names) and "lm_head.weight" in names
    magnitudes = [name for name in one_process["dora"] if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 2 * 3


def test_partial_runs_keep_the_rest_and_its_moments_out(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    """Steps hold the whole model; frozen tensors stay to the bit; it resumes."""
    options = {"model__init": str(two_ranks), "trainable__modules": ["o_proj"]}
    run_distributed(train_job, 2, assets, tmp_path / "run", training__steps=1, **options)
    run_distributed(train_job, 2, assets, tmp_path / "run", training__steps=2, **options)
    before = tensors_of(two_ranks / "checkpoint/step-6")
    after = tensors_of(tmp_path / "run/checkpoint/step-2")
    moments = [name for name in after if name.startswith("optimizer.")]
    assert moments and all("o_proj" in name for name in moments)
    for name, tensor in before.items():
        if not name.startswith("optimizer."):
            assert torch.equal(after[name], tensor) == ("o_proj" not in name), name


# The teacher --------------------------------------------------------------------------------


def teacher_logits(reference: str, tokens: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A sharded teacher's logits; bytes of it on this rank, after it was asked, and in all."""
    from torch.distributed.tensor import DTensor

    from flame.checkpoint.reference import resolve
    from flame.process.distributed import data_parallel_mesh
    from flame.recovery.distill import Teacher
    from flame.training.losses.chunked import Projection

    teacher = Teacher.build(resolve(reference), data_parallel_mesh(), torch.float32)
    for _ in range(2):
        states, _ = teacher.states({"input": tokens})
        logits = Projection.of(teacher.head)(states)
        teacher.release()
    parameters = list(teacher.model.parameters())
    own = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parameters)
    state = teacher.model._get_fsdp_state()
    assert not state._comm_ctx.post_forward_order
    return logits, own, sum(p.nbytes for p in parameters)


def test_a_teacher_is_sharded_and_says_what_the_whole_model_says(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    """A LoRA run, whose adapters are merged while they are read."""
    from flame.checkpoint.load import load_model
    from flame.checkpoint.reference import resolve

    run = tmp_path / "lora"
    options = {**LORA, "model__init": str(two_ranks), "training__steps": 1, "lora__merge": False}
    run_distributed(train_job, 2, assets, run, **options)
    tokens = torch.arange(90)[None] % 300
    with torch.no_grad():
        expected = load_model(resolve(run))(tokens).logits
    for logits, own, whole in run_distributed(teacher_logits, 2, str(run), tokens):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert own < 0.52 * whole


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    from flame.recipe.sections import Distill
    from flame.recovery.distill import Teacher
    from flame.training.objective import Objective
    from tests.flame.tiny import GATED_DELTANET, build

    student, twin = build(GATED_DELTANET).eval(), build(GATED_DELTANET).eval()
    options = Distill(teacher="twin", ce_weight=0.0, hidden_weight=1.0)
    tokens = torch.arange(20)[None]
    losses = Objective(student, options, Teacher(twin))({"input": tokens}, tokens)
    losses.total.backward()
    assert float(losses.kl) == pytest.approx(0, abs=1e-4) and float(losses.hidden) == 0
    assert float(losses.cross_entropy) > 1
    gradients = [p.grad.abs().max() for p in student.parameters() if p.grad is not None]
    assert max(gradients) < 1e-3
    assert all(p.grad is None for p in twin.parameters())


def test_a_run_remembers_its_teacher(teacher: Path, two_ranks: Path, tmp_path: Path) -> None:
    from flame.recovery.recorded_models import TEACHER_FILE, record_teacher

    record_teacher(str(teacher), tmp_path, tmp_path)
    record_teacher(str(teacher), tmp_path, tmp_path)
    assert json.loads((tmp_path / TEACHER_FILE).read_text())["reference"] == str(teacher)
    with pytest.raises(UserError, match="not the teacher that .* learnt from"):
        record_teacher(str(two_ranks), tmp_path, tmp_path)


def test_a_refused_start_leaves_the_run_as_it_was(
    assets: Path, teacher: Path, two_ranks: Path, tmp_path: Path
) -> None:
    from flame.run_folder.prepare import prepare_run_folder
    from flame.training.job_checks import check_job

    run = tmp_path / "run"
    # As a job leaves it that was killed while it wrote these files for the first time.
    (run / ".new").mkdir(parents=True)
    (run / ".new/recipe.toml").write_text("[job")
    first = make_job(assets, run, distill__teacher=str(teacher), checkpoint__load_step=2)
    check_job(first, 1)
    prepare_run_folder(first)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert {"config.json", "recipe.toml", "teacher.json", "tokenizer.json"} <= set(before)
    assert b"load_step" not in before["recipe.toml"], "it is asked of one start alone"
    other = make_job(assets, run, distill__teacher=str(two_ranks), training__steps=99)
    with pytest.raises(UserError, match="not the teacher"):
        prepare_run_folder(other)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


NARROW = TINY | {"hidden_size": 16}
SMALL = TINY | {"vocab_size": 280}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: it takes a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"ce_weight": -0.1}, "ce_weight is -0.1"),
        ({"weight": 0.0, "ce_weight": 0.0}, "all 0"),
        ({"chunk_tokens": -1}, "chunk_tokens is -1"),
        ({"teacher": "/no/such/model"}, "no model at /no/such/model"),
        ({"teacher": "", "hidden_weight": 1.0}, "hidden_weight is 1.0, and there is no teacher"),
        ({"teacher": "small"}, "280 tokens in its vocabulary, the student 300"),
        ({"teacher": "narrow", "hidden_weight": 1.0}, "hidden_size is 16, the student's 32"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(
    assets: Path, teacher: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    from flame.training.job_checks import check_job

    for name, config in (("small", SMALL), ("narrow", NARROW)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    options = {"teacher": str(teacher), **options}
    if options["teacher"] in ("small", "narrow"):
        options["teacher"] = str(tmp_path / options["teacher"])
    overrides = {f"distill__{name}": value for name, value in options.items()}
    with pytest.raises(UserError, match=words):
        check_job(make_job(assets, tmp_path / "run", **overrides), 1)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_nan_weights_is_refused_before_the_run_folder_is_made(
    assets: Path, teacher: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from flame.train import train
    from tests.flame.tiny import write_hf_folder

    tensors = load_file(teacher / "model.safetensors")
    tensors["lm_head.weight"][3] = float("nan")
    broken = write_hf_folder(tmp_path / "broken", TINY, tensors)
    with pytest.raises(UserError, match="lm_head.weight holds 32 NaN"):
        train(make_job(assets, tmp_path / "run", distill__teacher=str(broken)))
    assert not (tmp_path / "run").exists()


def test_every_option_of_a_teacher_is_in_the_resolved_recipe(assets: Path, tmp_path: Path) -> None:
    import tomllib

    from flame.config import job_from_tables
    from flame.recipe import recipe_text

    changed = {"distill__teacher": "t", "distill__temperature": 3.0, "distill__hidden_weight": 0.1}
    job = make_job(assets, tmp_path, **changed)
    again = job_from_tables(tomllib.loads(recipe_text(job)))
    assert dataclasses.asdict(again.distill) == dataclasses.asdict(job.distill)
