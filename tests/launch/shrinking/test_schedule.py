"""When channels go, and how many are left."""

import pytest

from flame.errors import UserError
from launch.shrinking.schedule import Phase, even_steps, phases


def test_channels_go_evenly_down_to_the_target() -> None:
    found = phases((0, 100, 250), 400, {"key": 128}, {"key": 64}, {"key": 16})
    # 128 - 64/3 = 106.7 and 128 - 128/3 = 85.3, to the nearest multiple of 16.
    assert found == [
        Phase(1, 0, 100, {"key": 112}),
        Phase(2, 100, 250, {"key": 80}),
        Phase(3, 250, 400, {"key": 64}),
    ]


def test_a_first_part_without_pruning_is_a_phase_of_its_own() -> None:
    found = phases((10,), 30, {"key": 32}, {"key": 16}, {"key": 4})
    assert found == [Phase(1, 0, 10, {}), Phase(2, 10, 30, {"key": 16})]


def test_a_kind_that_does_not_change_is_left_out_of_a_phase() -> None:
    sizes, target, multiples = {"key": 32, "head": 3}, {"key": 8, "head": 2}, {"key": 8, "head": 1}
    found = phases((0, 5, 9), 12, sizes, target, multiples)
    assert [phase.widths for phase in found] == [{"key": 24}, {"key": 16, "head": 2}, {"key": 8}]


@pytest.mark.parametrize(
    ("from_start", "at"), [(True, (0, 33, 66)), (False, (25, 50, 75))], ids=["init", "scratch"]
)
def test_training_is_cut_into_equal_parts(from_start: bool, at: tuple[int, ...]) -> None:
    assert even_steps(3, 100, from_start) == at


def test_what_does_not_reach_the_target_is_refused() -> None:
    with pytest.raises(UserError, match="does not reach its target: it prunes after step 30"):
        phases((0, 30), 30, {"key": 32}, {"key": 16}, {"key": 4})


def test_a_pruning_that_removes_nothing_is_refused() -> None:
    message = "after step 10 would remove nothing: 3 prunings are too many for 32 to 16 key"
    with pytest.raises(UserError, match=message):
        phases((0, 10, 20), 30, {"key": 32}, {"key": 16}, {"key": 8})


def test_more_prunings_than_steps_are_refused() -> None:
    with pytest.raises(UserError, match="cut 3 steps into 4 parts"):
        even_steps(4, 3, True)
