"""A scheduler's timesteps in the units of the model's argument."""

from __future__ import annotations

import pytest
import torch

from toca_fx.runtime.schedules import Schedule, Timestep
from toca_fx.runtime.units import in_units

TOLD: Schedule = tuple((float(t),) for t in (1000.0, 903.125, 750.5, 400.25, 9.75))
FLOAT = torch.float32


def ran(convert: object, dtype: torch.dtype = FLOAT, *, cast_first: bool = False) -> Schedule:
    """What a pipeline calls its model with, in its own arithmetic."""
    t = torch.tensor(TOLD).flatten()
    made = convert(t.to(dtype) if cast_first else t).to(dtype)  # type: ignore[operator]
    return tuple((float(each),) for each in made.double())


UNITS = {
    "t": lambda t: t,
    "t / 1000": lambda t: t / 1000,
    "1 - t / 1000": lambda t: 1 - t / 1000,
    "(1000 - t) / 1000": lambda t: (1000 - t) / 1000,
    "1000 - t": lambda t: 1000 - t,
    "t times a number of the config": lambda t: t * 4.0,
    "t / 1000 times a number of the config": lambda t: t / 1000 * 4.0,
}


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("cast_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_unit_is_found_to_the_last_digit(
    unit: str, first: int, dtype: torch.dtype, cast_first: bool
) -> None:
    called = ran(UNITS[unit], dtype, cast_first=cast_first)
    if called[first] == (0.0,):
        return  # 0 tells nothing: see below
    found = in_units(TOLD, called[first], dtype, first, (4.0,))
    assert found[first] == called[first]
    if dtype == torch.float32:
        assert found == called


@pytest.mark.parametrize("timestep", [(0.0,), (123.456,), (1000.0, 1.0, 2.0, 3.0) * 500])
def test_what_fits_nothing_stays(timestep: Timestep) -> None:
    assert in_units(TOLD, timestep, FLOAT, 0) == TOLD


def test_values_that_stay_stay() -> None:
    """One per token: the first frame is given, and its timestep is 0 (Wan 2.2 5B)."""
    found = in_units(TOLD, (0.0, 0.0, 1.0, 1.0), FLOAT, 0)
    assert found == tuple((0.0, 0.0, each, each) for (each,) in ran(UNITS["t / 1000"]))


def test_without_a_number_any_place_will_do() -> None:
    assert in_units(TOLD, (750.5,), FLOAT) == TOLD
    assert in_units(TOLD, (0.75050002336502075,), FLOAT) == ran(UNITS["t / 1000"])


def test_whole_numbers_stay_whole() -> None:
    told: Schedule = ((981.0,), (961.0,), (1.0,))
    assert in_units(told, (981.0,), torch.int64, 0) == told
