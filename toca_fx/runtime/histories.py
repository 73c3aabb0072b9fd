"""The histories of a generation: which tensor holds the newest value, and what it was computed at.

Full steps write the tensor that holds the oldest value, which is the newest from then on. Steps
that read a history get its weights as a tensor [H]; unknown values, of a generation that has just
begun or lost its memories, are 0 and weigh nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from toca_fx.kernels.forecast import weighted_sum
from toca_fx.plan.buffers import Buffer, memory
from toca_fx.plan.forecast import weights
from toca_fx.plan.plan import Plan, StepPlan, Timeline
from toca_fx.plan.times import time_of


class Moment(NamedTuple):
    """A step of a generation by its position among the calls, and its timestep, if it is known."""

    position: int
    timestep: float | None


class _Line:
    """One timeline of a plan: whose values are kept, and those of which moments."""

    def __init__(self, plan: Plan, timeline: Timeline, buffers: Mapping[Buffer, Tensor]) -> None:
        self.sites, self.rule = timeline
        self.site = self.sites[0]
        # A policy says it where the axis needs it.
        self._noise = plan.settings.noise or "flow"
        kept = plan.histories[self.site]
        self._of = [memory(site, kept) for site in self.sites]
        self._values = [[buffers[part] for part in parts] for parts in self._of]
        self._weights = buffers[Buffer("weights", self.site)]
        self.tensors = {Buffer("weights", site): self._weights for site in self.sites}
        self.moments: list[Moment] = []
        self.turn, self._written = 0, False
        self._hand_out()

    def clear(self) -> None:
        """Forget all values: a weight of 0 takes away no NaN that is left of them.

        The tensors are in their first order again, so that recordings of a generation fit the next.
        """
        self.moments.clear()
        self.turn = 0
        self._hand_out()
        if self._written:
            for value in chain.from_iterable(self._values):
                value.zero_()
        self._written = False

    def _hand_out(self) -> None:
        """Say which tensor is which: the newest value is that of the ``turn``."""
        for parts, values in zip(self._of, self._values, strict=True):
            turned = values[-self.turn :] + values[: -self.turn]
            self.tensors.update(zip(parts, turned, strict=True))

    def turn_over(self) -> None:
        """Make the oldest value the newest: the step that comes writes it."""
        self.turn, self._written = (self.turn + 1) % len(self._weights), True
        self._hand_out()

    def take_over(self, other: _Line) -> None:
        """Go on with what ``other`` knows, whose tensors ours hold the values of."""
        self.moments, self.turn, self._written = list(other.moments), other.turn, True
        self._hand_out()

    def weigh(self, now: Moment) -> None:
        """Put the weights of a step that reads the history."""
        *times, at = self._times([*self.moments[-len(self._weights) :], now])
        distance = now.position - self.moments[-1].position
        found = weights(self.rule, tuple(times), at, distance, len(self.moments))
        padded = [*found, *[0.0] * (len(self._weights) - len(found))]
        on_gpu = self._weights.device.type == "cuda"
        # From memory that is not pinned the copy would wait for the device.
        given = torch.tensor(padded, dtype=self._weights.dtype, pin_memory=on_gpu)
        self._weights.copy_(given, non_blocking=True)

    def forecast(self, site: int, now: Moment) -> tuple[Tensor, int] | None:
        """See ``Histories.forecast``."""
        if not self.moments:
            return None
        self.weigh(now)
        values = [self.tensors[part] for part in memory(site, len(self._weights))]
        made = weighted_sum(self._weights, *values, dtype=self._weights.dtype)
        return made, now.position - self.moments[-1].position

    def _times(self, moments: Sequence[Moment]) -> list[float]:
        """Moments on the axis of the policy; by position where a timestep is not known."""
        timesteps = [moment.timestep for moment in moments if moment.timestep is not None]
        if self.rule.time in (None, "step") or len(timesteps) < len(moments):
            return [float(moment.position) for moment in moments]
        kind, noise = self.rule.time, self._noise
        return [time_of(kind, 0, timestep, noise) for timestep in timesteps]


class Histories:
    """All histories of one generation of ``plan``, whose tensors are among ``buffers``.

    ``tensors`` are what a step is given of them.
    """

    def __init__(self, plan: Plan, buffers: Mapping[Buffer, Tensor]) -> None:
        self._lines = [_Line(plan, each, buffers) for each in plan.timelines]
        self.tensors: dict[Buffer, Tensor] = {}
        self._collect()

    def _collect(self) -> None:
        for line in self._lines:
            self.tensors.update(line.tensors)

    @property
    def turns(self) -> tuple[int, ...]:
        """What tells recordings apart: which tensors a step reads and writes."""
        return tuple(line.turn for line in self._lines)

    def clear(self) -> None:
        """Forget all values."""
        for line in self._lines:
            line.clear()
        self._collect()

    def prepare(self, step: StepPlan, now: Moment) -> None:
        """Hand out the tensors and weights of a step that comes."""
        for line in self._lines:
            mode = step.modes[line.site]
            if mode == "full":
                line.turn_over()
            elif mode in ("reuse", "partial"):
                line.weigh(now)
        self._collect()

    def forecast(self, site: int, now: Moment) -> tuple[Tensor, int] | None:
        """What a step at ``now`` would read of a site, and how many steps old its newest value is.

        None: it has no value yet.
        """
        line = next(line for line in self._lines if site in line.sites)
        return line.forecast(site, now)

    def newest(self, site: int) -> Tensor:
        """The newest value of a site that has a history."""
        return self.tensors[Buffer("cache", site, 0)]

    def note(self, step: StepPlan, now: Moment) -> None:
        """Note that a step has run."""
        for line in self._lines:
            if step.modes[line.site] == "full":
                line.moments.append(now)

    def take_over(self, other: Histories) -> None:
        """Go on with what ``other`` knows; the tensors hold the same values already."""
        for own, given in zip(self._lines, other._lines, strict=True):
            own.take_over(given)
        self._collect()
