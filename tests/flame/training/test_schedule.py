"""Learning-rate schedules against their formula, after a resume and with other steps."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flame.errors import UserError
from tests.flame.jobs import make_job

LR = 0.5


def build(steps: int, **settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    from flame.config import JobConfig
    from flame.training.schedule import build_schedules

    config = dataclasses.replace(JobConfig().lr_scheduler, **settings)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], lr=LR)
    return build_schedules([optimizer], config, steps), optimizer


def rates(schedules: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The rates that `steps` steps train at, all groups agreeing."""
    found = []
    for _ in range(steps):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        found.append(rate)
        optimizer.step()
        schedules.step()
    return found


def formula(step: int, total: int, warmup: int, decay: int, kind: str, least: float = 0.0) -> float:
    if step < warmup:
        return LR * (step + 1) / warmup
    if step <= total - decay:
        return LR
    progress = (step - total + decay) / decay
    curve = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[kind]
    return LR * (least + (1 - least) * curve)


@pytest.mark.parametrize("kind", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize(("ratio", "decay"), [(None, 15), (0.25, 5), (0.0, 0)])
def test_rates_follow_the_formula(kind: str, ratio: float | None, decay: int) -> None:
    settings = {"warmup_steps": 5, "decay_ratio": ratio, "decay_type": kind}
    schedules = build(20, **settings, min_lr_factor=0.1)
    expected = [formula(s, 20, 5, decay, kind, 0.1) for s in range(20)]
    assert rates(*schedules, 20) == pytest.approx(expected, rel=1e-12)


def test_a_resumed_schedule_goes_on(steps: int = 20) -> None:
    settings = {"warmup_steps": 3, "decay_ratio": 0.5, "decay_type": "cosine"}
    whole = rates(*build(steps, **settings), steps)
    first, optimizer = build(steps, **settings)
    begin = rates(first, optimizer, 12)
    second, other = build(steps, **settings)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    second.apply()
    assert begin + rates(second, other, steps - 12) == whole


def test_more_steps_and_another_rate_hold_from_the_first_step_after_a_resume() -> None:
    """WSD: the stable phase goes on, and the decay comes at the new end."""
    settings = {"warmup_steps": 2, "decay_ratio": 0.2, "decay_type": "linear"}
    first, optimizer = build(10, **settings)
    rates(first, optimizer, 9)
    second, other = build(20, **settings)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    second.apply()
    expected = [formula(s, 20, 2, 4, "linear") for s in range(9, 20)]
    assert rates(second, other, 11) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"decay_type": "steps"}, "choose from linear, sqrt, cosine"),
        ({"decay_ratio": 1.5}, "decay_ratio is 1.5"),
        ({"decay_ratio": 0.9, "warmup_steps": 2}, "9 steps of decay after 2 of warm-up are more"),
        ({"decay_ratio": float("nan")}, "decay_ratio is nan"),
        ({"min_lr_factor": -0.1}, "min_lr_factor is -0.1"),
        ({"total_steps": 9}, "must not end before the training"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], words: str) -> None:
    from flame.config import JobConfig
    from flame.training.schedule import check_schedule

    defaults = dataclasses.asdict(JobConfig().lr_scheduler)
    check_schedule(SimpleNamespace(**defaults), 10)
    with pytest.raises(UserError, match=words):
        check_schedule(SimpleNamespace(**(defaults | settings)), 10)


def test_a_job_with_nonsense_is_refused_before_it_starts(assets: Path, tmp_path: Path) -> None:
    from flame.training.job_checks import check_job

    with pytest.raises(UserError, match="decay_ratio is 2.0"):
        check_job(make_job(assets, tmp_path / "run", lr_scheduler__decay_ratio=2.0), 1)
    with pytest.raises(UserError, match="max_nonfinite_steps is 0"):
        check_job(make_job(assets, tmp_path / "run", training__max_nonfinite_steps=0), 1)
    with pytest.raises(UserError, match="validation.steps is 0"):
        check_job(make_job(assets, tmp_path / "run", validation__steps=0), 1)
    with pytest.raises(UserError, match="nowhere.jsonl does not exist"):
        options = {"validation__enable": True, "data__heldout": "nowhere.jsonl"}
        check_job(make_job(assets, tmp_path / "run", **options), 1)
