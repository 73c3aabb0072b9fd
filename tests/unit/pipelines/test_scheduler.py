"""What the schedulers of diffusers say, read as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from toca_fx.pipelines.scheduler import numbers, position, timetable


def steps(scheduler: Any) -> list[int | None]:
    """The positions that are told at each call of a loop."""
    found = []
    for t in scheduler.timesteps[scheduler.begin_index or 0 :]:
        table = timetable(scheduler)
        assert table is not None
        found.append(position(scheduler, table.begin))
        scheduler.step(torch.ones(1, 2), t, torch.ones(1, 2))
    return found


@pytest.mark.parametrize("of", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize("begin", [0, 2])
def test_a_scheduler_that_counts(of: Any, begin: int) -> None:
    scheduler = of()
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(begin)
    table = timetable(scheduler)
    assert table is not None
    assert table.values == tuple(scheduler.timesteps[begin:].double().tolist())
    assert steps(scheduler) == [*range(len(table.values))]


def test_a_scheduler_that_does_not_count() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    assert timetable(scheduler).values == (750.0, 500.0, 250.0, 0.0)  # type: ignore[union-attr]
    assert position(scheduler, 0) is None


def test_timesteps_that_are_set_again_are_others() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    one = timetable(scheduler)
    scheduler.set_timesteps(4)
    two = timetable(scheduler)
    assert one is not None
    assert two is not None
    assert one.source is not two.source
    assert one.values == two.values


@pytest.mark.parametrize(
    "timesteps", [None, "many", torch.ones(2, 2), torch.tensor([float("nan")]), [], torch.empty(0)]
)
def test_what_is_no_list_of_timesteps(timesteps: Any) -> None:
    assert timetable(SimpleNamespace(timesteps=timesteps)) is None
    assert timetable(object()) is None


def test_numbers_of_a_configuration() -> None:
    config = {"a": 1000, "b": 0.5, "c": True, "d": "x", "e": [3], "f": 4.0}
    assert numbers(config) == (4.0, 1000.0)
    assert numbers(None) == ()
