"""Schedules: which timesteps a run had, and whether it was whole."""

from __future__ import annotations

import pytest

from toca_fx.runtime.schedules import Schedule, Schedules, fits, is_whole, longest


def at(*timesteps: float) -> Schedule:
    return tuple((timestep,) for timestep in timesteps)


def shifted(steps: int, shift: float) -> Schedule:
    """Flow matching as SD3 and FLUX sample: 1 down to about 1 / steps, shifted."""
    sigmas = [1 - step / steps for step in range(steps)]
    return at(*(shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas))


WHOLE = [
    at(999.0, 749.0, 499.0, 249.0),
    at(*(float(t) for t in range(981, 0, -20))),
    at(*(float(t) for t in range(999, 0, -20))),
    at(*(1000 * (1 - step / 30) for step in range(30))),
    at(*(step / 8 for step in range(8))),
    shifted(4, 3.0),
    shifted(20, 3.0),
    shifted(28, 3.16),
    tuple((1000 * t,) for (t,) in shifted(50, 3.0)),
]


@pytest.mark.parametrize("schedule", WHOLE, ids=lambda schedule: f"{len(schedule)} steps")
def test_a_run_is_whole_at_its_end_and_not_before(schedule: Schedule) -> None:
    assert is_whole(schedule, 0)
    for length in range(1, len(schedule) * 3 // 4):
        assert not is_whole(schedule[:length], 0), length
    assert is_whole(schedule[:3], 3), "the policy's number of steps"


def test_what_goes_on_was_not_whole() -> None:
    seen = Schedules()
    for length in range(1, 11):
        seen.note(WHOLE[1][:length], 5)
        assert (WHOLE[1][:5] in seen.whole) == (length == 5)


def test_two_runs_that_end_alike_were_whole() -> None:
    seen, refined = Schedules(), at(999.0, 899.0, 799.0)  # the rest is another model's
    seen.end(refined)
    assert not seen.whole
    seen.end(refined)
    assert seen.whole == (refined,)
    assert longest(seen.whole, refined[:2]) == refined
    assert longest(seen.whole, at(999.0, 898.0)) is None


def test_schedules_are_bounded() -> None:
    seen = Schedules()
    for number in range(100):
        seen.add(at(1000.0 + number, 500.0, 1.0))
    assert len(seen.whole) == 32
    assert seen.whole[-1][0] == (1099.0,)
    seen.add(at(5.0))
    assert len(seen.whole) == 32, "of one step nothing is cached"


def test_a_timestep_fits_but_for_rounding() -> None:
    listed = at(0.9, 0.5)
    assert fits(listed, 0, (0.9,), 0.0)
    assert fits(listed, 0, (0.8984375,), 2**-7)  # bfloat16(0.9)
    assert not fits(listed, 1, (0.8984375,), 2**-7)
    assert not fits(listed, 2, (0.5,), 0.0)
    assert not fits(listed, -1, (0.5,), 0.0)
    assert not fits(listed, 0, (0.9, 0.5), 0.0)
