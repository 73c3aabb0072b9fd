"""What is told of a run: as its first call comes, and at each call."""

from __future__ import annotations

from dataclasses import replace

from toca_fx.runtime import words
from toca_fx.runtime.clock import Progress, Told
from toca_fx.runtime.schedules import Timestep, fits


def start(
    told: Told,
    timestep: Timestep | None,
    rounding: float,
    others: tuple[Progress, ...],
    num_steps: int | None,
) -> tuple[Told, str | None]:
    """What is told of the run of a model that is called for the first time in a session.

    It has what is left of the session's steps: ``others`` are the models that ran before it. Two
    experts have a position each, and a run may begin in the middle of a schedule. Returns a warning
    too, if the timesteps told are no timesteps of the model; their number counts then.
    """
    if told.timesteps is not None and timestep is not None:
        length = len(told.timesteps)
        for at in range(length):
            if fits(told.timesteps, at, timestep, rounding):
                return Told(length - at, told.timesteps[at:], skipped=at), None
        return Told(length), words.UNITS
    furthest = max(others, key=lambda other: other.position, default=None)
    if furthest is None or num_steps is None:
        return told, None
    same = timestep is not None and timestep == furthest.timestep
    gone = furthest.position - 1 if same else furthest.position
    left = told.num_steps - gone
    if gone == 0 or left < 1:
        return told, None
    rest = None if told.timesteps is None else told.timesteps[gone:]
    return Told(left, rest, skipped=gone), None


def both(run: Told | None, call: Told | None) -> Told | None:
    """What was told of a ``run``, with the place that came with the ``call``.

    What was said of the run comes first. The call's number counts if it is one out of as many.
    """
    if run is None or call is None or call.position is None:
        return run or call
    position = call.position - run.skipped
    if call.num_steps != run.num_steps + run.skipped or position < 0:
        return run
    return replace(run, position=position)
