"""Schedules tried in earnest: the forecasts of a generation, and the search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toca_fx.policy import Forecast
from toca_fx.quality.forecasting import Forecasting
from toca_fx.quality.refine import Schedule, refine

LINE = Forecast(basis="newton", order=1)


def powers(step: Tensor, branch: float = 0.0) -> tuple[Tensor]:
    return (torch.stack([branch + step, step**2]),)


def said(forecast: Forecast, full: tuple[int, ...], branches: int = 1) -> list[Tensor]:
    answer = Forecasting(powers, forecast, full, branches)
    return [
        answer(torch.tensor(float(step)), float(branch))[0]  # type: ignore[index]
        for step in range(8)
        for branch in range(branches)
    ]


def test_full_steps_are_computed_and_the_others_forecast() -> None:
    found = said(LINE, (0, 1, 4))
    line = [0, 1, 2, 3, 4, 5, 6, 7]
    square = [0, 1, 2, 3, 16, 21, 26, 31]  # from the last two full steps
    assert torch.equal(torch.stack(found), torch.tensor([line, square]).float().T)


def test_the_order_rises_with_the_history() -> None:
    found = said(Forecast(basis="newton", order=2), (0, 2, 5))
    assert [float(each[1]) for each in found] == [0, 0, 4, 6, 8, 25, 36, 49]


def test_branches_have_histories_of_their_own() -> None:
    found = said(LINE, (0, 1, 4), branches=2)
    assert torch.equal(torch.stack(found[::2]), torch.stack(said(LINE, (0, 1, 4))))
    assert [float(each[0]) for each in found[1::2]] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_sums_are_taken_in_float32() -> None:
    def constant(step: Tensor) -> Tensor:
        return torch.full((1,), 1.0078125, dtype=torch.bfloat16)

    answer = Forecasting(constant, Forecast(basis="newton", order=2), (0, 1, 2), 1)
    found = [answer(torch.tensor(float(step))) for step in range(40)]
    assert all(torch.equal(each, found[0]) for each in found)


def distance(schedule: Schedule) -> float:
    return float(sum(abs(step - aim) for step, aim in zip(schedule.full, (0, 4, 9), strict=True)))


def test_the_best_candidate_is_moved_while_it_gets_better() -> None:
    start = Schedule(LINE, (0, 2, 3))
    assert refine([start], 12, distance, distance, most=100) == (Schedule(LINE, (0, 4, 9)), 0.0)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_schedules_are_tried_than_may_be(most: int) -> None:
    tried: list[Schedule] = []

    def measured(schedule: Schedule) -> float:
        tried.append(schedule)
        return distance(schedule)

    candidates = [Schedule(LINE, full) for full in ((0, 1, 2), (0, 2, 3), (0, 2, 3))]
    best, error = refine(candidates, 12, measured, lambda schedule: 0.0, most)
    assert len(tried) == len({*tried}) == most
    assert error == distance(best) == min(map(distance, tried))


def test_what_is_predicted_says_what_is_tried_first() -> None:
    tried: list[Schedule] = []

    def measured(schedule: Schedule) -> float:
        tried.append(schedule)
        return float(len(tried))  # nothing gets better

    refine([Schedule(LINE, (0, 2, 3))], 12, measured, distance, most=3)
    assert [distance(each) for each in tried] == [8, 1, 2]
