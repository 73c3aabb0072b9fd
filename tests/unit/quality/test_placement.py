"""Courses and placements: against sums over real tensors, and against trying everything."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from toca_fx.policy import Forecast
from toca_fx.quality.course import Course, Errors, course_of
from toca_fx.quality.placement import neighbours, place, polish

ORDERS = (0, 1, 2)


def newton(order: int) -> Forecast:
    return Forecast(basis="newton", order=order)


def generation(steps: int, sources: int, seed: int) -> tuple[Tensor, Tensor]:
    """Outputs [T, S, n] that go smoothly through the steps, and gains [T, S]."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(4, sources, 30, generator=generator, dtype=torch.float64)
    times = torch.linspace(0, 2, steps, dtype=torch.float64)
    waves = torch.stack([torch.ones(steps), times, (3 * times).sin(), (5 * times**2).cos()], 1)
    return torch.einsum("tw,wsn->tsn", waves.double(), draw), torch.rand(
        steps, sources, generator=generator, dtype=torch.float64
    )


def course(outputs: Tensor, gains: Tensor) -> Course:
    flat = outputs.flatten(0, 1)
    return course_of(flat @ flat.T, gains)


def stretches(outputs: Tensor, gains: Tensor, order: int, full: tuple[int, ...]) -> list[Tensor]:
    """What the forecasts behind each full step do to the result, [n] each, in small steps."""
    found = []
    for index, last in enumerate(full):
        known = full[max(0, index - order) : index + 1]
        following = full[index + 1] if index + 1 < len(full) else len(outputs)
        moved = torch.zeros(outputs.shape[-1], dtype=torch.float64)
        for step in range(last + 1, following):
            forecast = torch.zeros_like(outputs[0])
            for own in known:
                weight = 1.0
                for other in known:
                    if other != own:
                        weight *= (step - other) / (own - other)
                forecast += weight * outputs[own]
            moved += gains[step] @ (outputs[step] - forecast)
        found.append(moved)
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("full", [(0,), (0, 3), (0, 1, 2, 6, 10), (0, 4, 11), tuple(range(12))])
def test_the_total_is_what_forecasts_of_the_tensors_do(
    full: tuple[int, ...], sources: int, order: int
) -> None:
    outputs, gains = generation(12, sources, seed=1)
    moved = torch.stack(stretches(outputs, gains, order, full)).sum(0)
    found = Errors(course(outputs, gains), newton(order)).total(full)
    torch.testing.assert_close(found**0.5, float(moved.norm()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("full", [1, 2, 3, 4, 6, 9])
def test_no_placement_is_better_by_the_sum_of_norms(full: int, order: int) -> None:
    outputs, gains = generation(9, 2, seed=full)

    def cost(steps: tuple[int, ...]) -> float:
        return sum(float(each.norm()) for each in stretches(outputs, gains, order, steps))

    every = [(0, *later) for later in combinations(range(1, 9), full - 1)]
    found = place(Errors(course(outputs, gains), newton(order)), full)
    assert found in every
    assert cost(found) == pytest.approx(min(map(cost, every)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_polish_ends_where_no_move_helps(order: int) -> None:
    outputs, gains = generation(14, 1, seed=3)
    errors = Errors(course(outputs, gains), newton(order))
    start = (0, 1, 2, 3, 4)
    found = polish(errors, start)
    assert errors.total(found) < errors.total(start)
    assert min(map(errors.total, neighbours(found, 14))) >= errors.total(found)


def test_neighbours_move_one_step_and_never_the_first() -> None:
    assert set(neighbours((0, 2), 4)) == {(0, 1), (0, 3)}
    assert len(list(neighbours((0, 2, 5), 8))) == 2 * 5


def test_emphasis_is_on_early_steps() -> None:
    outputs, gains = generation(11, 1, seed=5)
    changed = course(outputs, gains).emphasised(4.0).gains / gains
    assert float(changed[0] / changed[-1]) == pytest.approx(4.0)
    assert float(changed[5]) == pytest.approx(1.0)
    early = course(outputs, torch.ones_like(gains)).emphasised(1e4)
    late = course(outputs, torch.ones_like(gains)).emphasised(1e-4)
    early_steps, late_steps = (place(Errors(each, newton(1)), 5) for each in (early, late))
    assert sum(early_steps) < sum(late_steps)


@pytest.mark.parametrize("full", [0, 10])
def test_there_are_as_many_full_steps_as_steps_at_most(full: int) -> None:
    errors = Errors(course(*generation(9, 1, seed=0)), newton(1))
    with pytest.raises(ValueError, match=f"full={full}: expected 1 to 9"):
        place(errors, full)
