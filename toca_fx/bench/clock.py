"""Two ways to time contestants; both give medians over rounds.

On a CPU contestants take turns step by step, so that all see the same machine: its speed drifts,
and by more than the differences to be measured. So every step is compared with the uncached step
next to it, and the median over rounds is that of the share.

A GPU runs behind the host. Waiting for it after each step would hide what the host costs while it
queues, and what the two do at the same time. So contestants take turns generation by generation,
and nothing waits inside one: events tell the time of each step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Protocol

import torch

_FLUSHED_BYTES = 2**28


class Timed(Protocol):
    """A way to run the model that can be timed."""

    def generation(self) -> AbstractContextManager[Any]:
        """The context of one sampling run."""

    def step(self, call: Any) -> None:
        """Give one model call to the device; does not wait for it."""


class Event(Protocol):
    """A mark in the work of a device, as ``torch.cuda.Event``."""

    def record(self) -> None:
        """Put it behind the work given so far."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to another mark; both have been reached."""


class Device(Protocol):
    """A device that runs asynchronously to the host."""

    def event(self) -> Event:
        """A new mark."""

    def synchronize(self) -> None:
        """Wait until all work is done."""


@dataclass(frozen=True)
class Taken:
    """One generation in seconds: each step on the device and on the host, and the wall time."""

    device: Sequence[float]
    host: Sequence[float]
    wall: float


@dataclass(frozen=True)
class Timing:
    """Medians over rounds in seconds: of each step on the device and on the host, and of all.

    ``host`` is how long a call kept the caller; on a CPU that is the step itself. ``rounds`` are
    the seconds of every round's generation.
    """

    device: tuple[float, ...]
    host: tuple[float, ...]
    generation: float
    rounds: tuple[float, ...]


class Clock(Protocol):
    """A way to time contestants."""

    def time(
        self,
        contestants: Sequence[Timed],
        calls: Sequence[Any],
        rounds: int,
        advance: Callable[[float], None],
    ) -> list[Timing]:
        """Time ``rounds`` generations of each; the first contestant is the uncached one.

        ``advance`` is called with the share of the work done since its last call, and never while
        something is timed.
        """


class StepsInTurn:
    """The clock for a CPU: contestants take turns step by step."""

    def time(
        self,
        contestants: Sequence[Timed],
        calls: Sequence[Any],
        rounds: int,
        advance: Callable[[float], None],
    ) -> list[Timing]:
        """See ``Clock``."""
        flush = torch.empty(_FLUSHED_BYTES, dtype=torch.int8)
        taken = [[list[float]() for _ in calls] for _ in contestants]
        for _ in range(rounds):
            with ExitStack() as generations:
                for contestant in contestants:
                    generations.enter_context(contestant.generation())
                for step, call in enumerate(calls):
                    for contestant, steps in zip(contestants, taken, strict=True):
                        # No contestant finds weights in the processor's cache that the one before
                        # has read.
                        flush.zero_()
                        began = time.perf_counter()
                        contestant.step(call)
                        steps[step].append(time.perf_counter() - began)
                    advance(1 / (rounds * len(calls)))
        return paired(taken)


class WholeGenerations:
    """The clock for a GPU: contestants take turns generation by generation."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def time(
        self,
        contestants: Sequence[Timed],
        calls: Sequence[Any],
        rounds: int,
        advance: Callable[[float], None],
    ) -> list[Timing]:
        """See ``Clock``."""
        taken = [list[Taken]() for _ in contestants]
        for _ in range(rounds):
            for contestant, generations in zip(contestants, taken, strict=True):
                generations.append(self._generation(contestant, calls))
                advance(1 / (rounds * len(contestants)))
        return [medians(generations) for generations in taken]

    def _generation(self, contestant: Timed, calls: Sequence[Any]) -> Taken:
        marks, host = [self._device.event() for _ in range(len(calls) + 1)], list[float]()
        with contestant.generation():
            self._device.synchronize()
            began = time.perf_counter()
            marks[0].record()
            for call, mark in zip(calls, marks[1:], strict=True):
                asked = time.perf_counter()
                contestant.step(call)
                host.append(time.perf_counter() - asked)
                mark.record()
            self._device.synchronize()
            wall = time.perf_counter() - began
        return Taken([start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)], host, wall)


def medians(generations: Sequence[Taken]) -> Timing:
    """The medians of each step over the generations, and that of the generations."""
    device = tuple(map(statistics.median, zip(*(one.device for one in generations), strict=True)))
    host = tuple(map(statistics.median, zip(*(one.host for one in generations), strict=True)))
    rounds = tuple(taken.wall for taken in generations)
    return Timing(device, host, statistics.median(rounds), rounds)


def paired(taken: Sequence[Sequence[Sequence[float]]]) -> list[Timing]:
    """The timings of contestants that took turns, from seconds by contestant, step and round.

    A step's time is the median, over rounds, of its share of the uncached step next to it, times
    the median of all uncached steps.
    """
    plain = taken[0]
    usual = statistics.median(chain.from_iterable(plain))
    timings = []
    for row in taken:
        shares = [
            [one / other for one, other in zip(*step, strict=True)]
            for step in zip(row, plain, strict=True)
        ]
        steps = tuple(usual * statistics.median(share) for share in shares)
        timings.append(Timing(steps, steps, sum(steps), tuple(map(sum, zip(*row, strict=True)))))
    return timings
