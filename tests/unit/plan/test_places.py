"""Full steps that were placed for one number of steps, spread over others."""

from __future__ import annotations

import random

import pytest

from toca_fx.plan.places import listed_steps
from toca_fx.policy.interval import Placement

DENSE_FIRST = (0, 1, 2, 3, 5, 7, 9, 12, 15, 19, 24, 30, 36, 42, 47)
TO_THE_END = (30, 34, 38, 43, 48, 54, 60, 66, 72, 78, 84, 89, 94, 97)


def spread(of: int, at: tuple[int, ...], steps: int, order: str = "ascending") -> list[int]:
    indices = range(steps) if order == "ascending" else range(steps - 1, -1, -1)
    found = listed_steps(Placement(of, at), tuple(indices))
    return [s for s in indices if s in found]


@pytest.mark.parametrize(
    ("of", "at", "steps", "expected"),
    [
        (50, DENSE_FIRST, 50, [*DENSE_FIRST]),
        (50, (0, 10, 20, 30, 40), 100, [*range(0, 100, 10)]),
        (50, (0, 10, 20, 30, 40), 20, [0, 10]),
        (50, (0, 10, 20, 30, 40), 10, [0]),
        # A dense beginning stays one: every step of the first, wider and wider behind them.
        (50, DENSE_FIRST, 25, [0, 1, 2, 4, 6, 10, 15, 21]),
        (50, DENSE_FIRST, 100, [*range(7), *range(8, 18, 2), *range(18, 30, 3), *TO_THE_END]),
        (10, (0, 8, 9), 20, [0, 8, 16, 17, 18, 19]),
        (10, (0, 1, 2, 9), 3, [0]),
        (10, tuple(range(10)), 7, [*range(7)]),
        (10, tuple(range(10)), 17, [*range(17)]),
        (7, (3,), 1, []),
        (7, (5, 3, 3), 7, [3, 5]),
    ],
)
def test_full_steps_are_as_dense_as_they_were(
    of: int, at: tuple[int, ...], steps: int, expected: list[int]
) -> None:
    assert spread(of, at, steps) == expected


def test_descending_steps_are_spread_in_the_order_of_the_calls() -> None:
    mirrored = tuple(49 - s for s in DENSE_FIRST)
    for steps in (50, 30, 77, 1):
        calls = spread(50, DENSE_FIRST, steps)
        assert spread(50, mirrored, steps, "descending") == [steps - 1 - call for call in calls]


def test_there_is_the_same_share_of_full_steps_each_at_one_call() -> None:
    chance = random.Random(0)
    for _ in range(500):
        of, steps = chance.randint(1, 60), chance.randint(1, 120)
        at = tuple(sorted(chance.sample(range(of), k=chance.randint(1, of))))
        found = spread(of, at, steps)
        assert len(found) == round(len(at) * steps / of)
        assert set(found) <= set(range(steps))
        # As many lie before any point of the generation as the share says, to one of ``of``.
        for point in range(of):
            wanted = sum(s < point for s in at) * steps / of
            there = sum(s < point * steps / of for s in found)
            assert abs(there - wanted) < 2 + steps / of, (of, at, steps, point)
