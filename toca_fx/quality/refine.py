"""The last refinement of a schedule: what the final result says, where a course cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from toca_fx.policy import Forecast
from toca_fx.quality.placement import Steps, neighbours


@dataclass(frozen=True)
class Schedule:
    """The full steps of a generation, ascending from 0, and what forecasts the others."""

    forecast: Forecast
    full: Steps


def refine(
    candidates: Iterable[Schedule],
    total: int,
    measured: Callable[[Schedule], float],
    predicted: Callable[[Schedule], float],
    most: int,
) -> tuple[Schedule, float]:
    """The best of ``candidates`` and of what moving its full steps makes of it, and its error.

    After the candidates, the schedules that are one move away from the best one so far are
    ``measured``, the best ``predicted`` ones first, until ``most`` schedules have been. ``total``
    is T.
    """
    known: dict[Schedule, float] = {}

    def best() -> Schedule:
        return min(known, key=lambda schedule: known[schedule])

    for schedule in [*dict.fromkeys(candidates)][:most]:
        known[schedule] = measured(schedule)
    while len(known) < most:
        around = best()
        moved = (Schedule(around.forecast, full) for full in neighbours(around.full, total))
        left = [schedule for schedule in moved if schedule not in known]
        for schedule in sorted(left, key=predicted)[: most - len(known)]:
            known[schedule] = measured(schedule)
            if known[schedule] < known[around]:
                break
        if best() == around:
            break
    return best(), known[best()]
