"""Timesteps as plain data: told, compared, and remembered once a model has run them whole."""

from __future__ import annotations

from collections.abc import Sequence

from toca_fx.diagnostics import MOST_STEPS

Timestep = tuple[float, ...]
"""The value of a model's timestep argument: one number, or one per row and frame."""

Schedule = tuple[Timestep, ...]
"""The timesteps of a run, call by call."""

_MOST = 32  # schedules of one model; samplers make a handful
_NEAR_THE_END = 0.1


def fits(schedule: Schedule, at: int, timestep: Timestep, rounding: float) -> bool:
    """Whether ``timestep`` is the one at position ``at``, but for relative ``rounding``.

    bfloat16(t) / 1000 is not bfloat16(t / 1000).
    """
    if not 0 <= at < len(schedule) or len(schedule[at]) != len(timestep):
        return False
    pairs = zip(schedule[at], timestep, strict=True)
    return all(abs(listed - called) <= rounding * abs(listed) for listed, called in pairs)


def longest(seen: Sequence[Schedule], trail: Schedule) -> Schedule | None:
    """The longest of the schedules ``seen`` that begin as ``trail`` does; None: none does."""
    return max((each for each in seen if each[: len(trail)] == trail), key=len, default=None)


def is_whole(trail: Schedule, num_steps: int) -> bool:
    """Whether a run with these timesteps has come to its end, as far as they show.

    It has if it is as long as the policy's ``num_steps``, or if its next step would come to the end
    of the scale, or near it: to 0 downwards, to 1 or 1000 upwards. The next step is guessed from
    the last two, as schedulers that shift their timesteps make them longer or shorter one by one.
    """
    if len(trail) == num_steps:
        return True
    times = [each[0] for each in trail[-3:] if len(each) == 1]
    if len(times) < min(3, max(2, len(trail))):
        return False
    last = times[-1] - times[-2]
    before = times[-2] - times[-3] if len(times) > 2 else last
    following = times[-1] + (last * last / before if before else last)
    if last < 0:
        return following <= _NEAR_THE_END * trail[0][0]
    return following >= (1 - _NEAR_THE_END) * (1 if times[-1] <= 1 else 1000)


class Schedules:
    """The schedules that a model has run whole, least recently used first."""

    def __init__(self) -> None:
        self._whole: tuple[Schedule, ...] = ()
        self._ended: tuple[Schedule, ...] = ()

    @property
    def whole(self) -> tuple[Schedule, ...]:
        """Those that are known to be whole."""
        return self._whole

    def note(self, trail: Schedule, num_steps: int) -> None:
        """Take note of the timesteps of a run so far; ``num_steps`` are the policy's.

        A schedule that goes on was not whole.
        """
        self._whole = tuple(each for each in self._whole if each != trail[:-1])
        if is_whole(trail, num_steps):
            self.add(trail)

    def end(self, trail: Schedule) -> None:
        """Take note that a run ended; two that ended alike were whole."""
        if len(trail) < 2 or trail in self._whole:
            return
        if trail in self._ended:
            self.add(trail)
        self._ended = (*self._ended, trail)[-_MOST:]

    def add(self, trail: Schedule) -> None:
        """Take note of a whole schedule; of a single step nothing is cached."""
        if 1 < len(trail) <= MOST_STEPS:
            others = tuple(each for each in self._whole if each != trail)
            self._whole = (*others, trail)[-_MOST:]
