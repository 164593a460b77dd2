"""The recipes that are shipped: read, checked for 8 processes, and recovery's run at toy size."""

import json
from pathlib import Path
from typing import Any

import pytest

from flame.errors import UserError
from launch.sweeping.command import read_options
from tests.distributed import run_distributed
from tests.flame.jobs import scalars_of, tensors_of, write_assets
from tests.flame.tiny import build, stored_tensors, write_hf_folder

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "launch/recipes/small_sweep.toml"
RECIPES = sorted(set((ROOT / "launch/recipes").glob("*.toml")) - {SWEEP})
PARAMETERS = {"340M": 0.34e9, "370M": 0.374e9, "1.3B": 1.366e9}
"""Stated by size; a family may differ by 3 %."""

SIZED = [path for path in RECIPES if path.stem.rpartition("_")[2] in PARAMETERS]
RECOVERY = [path for path in SIZED if path.stem.startswith("recover_")]
PRETRAINING = [path for path in SIZED if path not in RECOVERY]


def name_of(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipes_are_read(path: Path) -> None:
    from flame.config import parse_job

    job = parse_job(["--job.config_file", str(path)])
    assert job.training.global_batch_size > 0 and job.training.steps > 0
    assert job.model.config or job.model.init


BED = {"gated_deltanet": (763_992, 10), "delta_net": (664_128, 10), "hybrid": (928_152, 8.8)}
"""Parameters of the test bed's models, and tokens that each is trained on for each of them."""


@pytest.mark.parametrize("kind", BED)
def test_the_test_bed_is_what_its_recipes_say(kind: str) -> None:
    from flame.config import parse_job
    from flame.model import count_parameters, meta_model

    path = ROOT / f"launch/recipes/small_{kind}.toml"
    job, (count, share) = parse_job(["--job.config_file", str(path)]), BED[kind]
    config = json.loads(Path(job.model.config).read_text())
    assert count_parameters(meta_model(config).parameters()) == count
    tokens = job.training.steps * job.training.global_batch_size * job.training.seq_len
    assert tokens / count == pytest.approx(share, abs=0.06)
    text = " ".join(line.lstrip("# ") for line in path.read_text().splitlines())
    assert f"{count:,} parameters" in text and f"{share} a parameter" in text
    options = read_options(["--config", str(SWEEP)], "slimstate sweep")
    assert [m.model for m in options.models if m.name.startswith(kind)] == [
        f"runs/small/{kind}-{seed}" for seed in (0, 1)
    ]
    assert str(options.recover) == str(SWEEP.parent / "small_recover.toml")


def test_all_sizes_are_there() -> None:
    assert {path.stem for path in PRETRAINING} == {
        f"{family}_{size}" for family in ("delta_net", "gated_deltanet") for size in PARAMETERS
    }
    assert {path.stem for path in RECOVERY} == {
        f"recover_{path.stem}" for path in PRETRAINING if "340M" not in path.stem
    }


@pytest.mark.parametrize("path", SIZED, ids=name_of)
def test_recipes_fit_eight_processes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is checked before a job starts, but for what needs the network or the models."""
    import flame.training.job_checks as checks
    from flame.config import parse_job
    from flame.model import count_parameters, meta_model
    from flame.recovery.recovery_checks import check_recovery

    job = parse_job(["--job.config_file", str(path)])
    checks.check_size(job, 8)
    checks.check_numbers(job)
    config = json.loads((path.parent / f"{path.stem.removeprefix('recover_')}.json").read_text())
    model = meta_model(config)
    count = count_parameters(model.parameters())
    assert count == pytest.approx(PARAMETERS[path.stem.rpartition("_")[2]], rel=0.03)
    monkeypatch.chdir(tmp_path)
    if job.distill.teacher:
        teacher = tmp_path / job.distill.teacher
        teacher.mkdir(parents=True)
        (teacher / "config.json").write_text(json.dumps(config))
        (teacher / "model.safetensors").write_bytes(b"")
    check_recovery(job, model, config)
    assert job.training.mixed_precision_param == "bfloat16"


@pytest.mark.parametrize("path", [p for p in PRETRAINING if "1.3B" in p.stem], ids=name_of)
def test_what_is_not_recomputed_fits_on_80_gb(path: Path) -> None:
    """By the figure that the recipe gives as its reason."""
    from flame.config import parse_job
    from flame.training.estimate import estimate

    job = parse_job(["--job.config_file", str(path)])
    assert job.activation_checkpoint.mode == "none" and not job.compile.enable
    total = sum(part.bytes for part in estimate(job, 8))
    assert total < 80e9
    assert f"--estimate says {total / 2**30:.1f} GiB on 8 GPUs" in path.read_text()


@pytest.mark.parametrize("processes", [1, 8, 16, 64])
@pytest.mark.parametrize("path", SIZED, ids=name_of)
def test_recipes_fit_two_nodes_and_more(path: Path, processes: int) -> None:
    """On more processes than sequences a step, the recipe's own way out is needed, and works."""
    import flame.training.job_checks as checks
    from flame.config import parse_job
    from flame.training.micro_batch import micro_batch

    words, way_out = ["--job.config_file", str(path)], ["--training.global_batch_size", "64"]
    if path in RECOVERY and processes == 64:
        with pytest.raises(UserError, match="global batch of 16 .*64 processes"):
            checks.check_size(parse_job(words), processes)
        assert "--training.global_batch_size 64" in path.read_text()
        words += way_out
    job = parse_job(words)
    checks.check_size(job, processes)
    size = micro_batch(job, processes)
    assert job.training.global_batch_size % (processes * size) == 0
    assert size == job.training.local_batch_size or processes == 64


@pytest.mark.parametrize("path", RECOVERY, ids=name_of)
def test_recovery_is_as_published(path: Path) -> None:
    from flame.config import parse_job

    job = parse_job(["--job.config_file", str(path)])
    training, lora, distill = job.training, job.lora, job.distill
    assert training.steps * training.global_batch_size * training.seq_len == 65_536_000
    assert (lora.rank, lora.alpha, lora.dropout) == (32, 64.0, 0.0)
    assert (distill.temperature, distill.weight, distill.ce_weight) == (2.0, 1.0, 1.0)
    assert (job.optimizer.lr, job.optimizer.eps, training.max_norm) == (1e-4, 1e-15, 1.0)
    schedule = job.lr_scheduler
    assert (schedule.decay_type, schedule.min_lr_factor) == ("cosine", 0.1)
    assert schedule.warmup_steps == 1
    assert 1600 * training.seq_len * training.steps == pytest.approx(6.55e9, rel=1e-3)


TINY = {
    "delta_net": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 16, "expand_v": 2.0},
}


@pytest.mark.parametrize("family", TINY)
def test_recovery_runs_at_toy_size(family: str, tmp_path: Path) -> None:
    """The recipe with its sizes shrunk: two steps on two processes, from a model and a teacher."""
    assets = write_assets(tmp_path)
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "hidden_ratio": 2,
        "vocab_size": 300,
        **TINY[family],
    }
    for name, seed in (("pruned", 0), ("dense", 1)):
        tensors = {n: t * 0.2 for n, t in stored_tensors(build(config, seed)).items()}
        write_hf_folder(tmp_path / name, config, tensors)
    run_distributed(recover, 2, f"launch/recipes/recover_{family}_370M.toml", assets)
    run = tmp_path / "run"
    names = tensors_of(run / "checkpoint/step-2")
    assert any(".lora_A." in name for name in names) and any("conv1d" in name for name in names)
    curves = {part: scalars_of(run, f"loss/{part}") for part in ("cross_entropy", "kl")}
    assert all(curve.keys() == {1, 2} for curve in curves.values())
    assert curves["kl"][1] > 0
    assert (run / "teacher.json").is_file() and (run / "merged/checkpoint/step-0").is_dir()


def recover(recipe: str, folder: Path) -> None:
    from flame.train import STAGE, run

    shrunk = {
        "job.dump_folder": folder / "run",
        "model.init": folder / "pruned",
        "distill.teacher": folder / "dense",
        "data.dataset": folder / "text.jsonl",
        "data.subset": "",
        "data.tokenizer": folder / "tokenizer",
        "data.virtual_shards": 4,
        "training.seq_len": 64,
        "training.global_batch_size": 4,
        "training.local_batch_size": 2,
        "training.steps": 2,
        "metrics.log_freq": 1,
        "lora.rank": 4,
    }
    words = [f"--{key}={value}" for key, value in shrunk.items()]
    run(STAGE.parse(["--config", str(ROOT / recipe), "--data.no-streaming", *words]))


def test_the_comparison_of_recoveries_trains_what_it_says(tmp_path: Path) -> None:
    from benchmarks.recovery_modes import MODES, parse, words
    from flame.config import parse_job
    from flame.train import STAGE

    options = parse([str(tmp_path / "demo"), str(tmp_path), "--rate", "all=1e-3", "full=5e-4"])
    for name, mode in MODES.items():
        if not mode.is_trained:
            continue
        job = parse_job(list(STAGE.parse(words(name, options)).arguments))
        assert job.lora.rank == (32 if "lora" in name or "dora" in name else 0)
        assert job.lora.dora == ("dora" in name)
        assert job.trainable.modules == ([".attn."] if "partial" in name else [])
        assert bool(job.distill.teacher) == name.endswith("-distilled")
        assert job.optimizer.lr == (5e-4 if name.startswith("full") else 1e-3)
        assert job.job.dump_folder == str(tmp_path / name)
