"""Gates: which steps of a run are full, decided as they come among those that the plan leaves open.

The decision is taken on the host, between graphs that are compiled already. On a CPU it knows all
that happened before the step. On an accelerator it knows what was measured ahead of the step
before, so that the host waits at most until the device has done the step before that one; what that
step changed is taken to be what the one before it did.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from toca_fx.plan.plan import Plan
from toca_fx.runtime.signals import SIGNALS, Facts, Signal
from toca_fx.runtime.watch import Later


class Choice(NamedTuple):
    """Whether a step is full, whatever the plan says, and why."""

    full: bool
    reason: str


_DUE = Choice(True, "at_most")


class Gate:
    """The gate of one generation: a ``signal``, called ``name``, and what is known of it.

    A step is full from the ``threshold`` on, or if ``at_most`` steps (None: any number) in a row
    were not. ``lags``: what is measured is read a step later.
    """

    def __init__(
        self, name: str, signal: Signal, threshold: float, at_most: int | None, lags: bool
    ) -> None:
        self.name, self.signal, self.threshold = name, signal, threshold
        self._at_most, self._lags = at_most, lags
        self.clear()

    def clear(self) -> None:
        """Forget all steps so far."""
        self.signal.clear()
        self._since = 0  # steps since the last full one
        self._observed: tuple[float, ...] = ()  # ahead of each of them
        self._pending: Later | None = None
        self._estimate: float | None = None

    @property
    def is_due(self) -> bool:
        """Whether the next step is full whatever the signal says."""
        return self._at_most is not None and self._since >= self._at_most

    @torch.no_grad()
    def observe(self, facts: Facts) -> None:
        """Ahead of each step: measure, and read what was."""
        measured = self.signal.observe(facts)
        given = None if measured is None else Later(measured)
        newest, self._pending = (self._pending, given) if self._lags else (given, None)
        if newest is None:
            self._estimate = None
            return
        value = newest.read()
        observed = (*self._observed, value)
        if self._since or not self._lags:  # else it is of a full step
            self._observed = observed
        if self._since and self._lags:
            observed = (*observed, value)
        self._estimate = self.signal.estimate(observed, self._since + 1)

    def choose(self) -> Choice:
        """What the step is, ahead of which was observed."""
        if self.is_due:
            return _DUE
        if self._estimate is None:
            return Choice(True, f"{self.name} not measured yet")
        # Not a number is no small one.
        full = not self._estimate < self.threshold
        return Choice(full, f"{self.name} {self._estimate:.3g}")

    @torch.no_grad()
    def begin(self, facts: Facts, full: bool) -> None:
        """Ahead of a step, once it is known whether it is full."""
        if full:
            self.signal.begin(facts)

    @torch.no_grad()
    def end(self, facts: Facts, full: bool, output: Tensor | None) -> None:
        """After a step; ``output`` is the model's, None if it makes none of its latents."""
        self._since += 1
        if full:
            self.signal.end(facts, output)
            self._since, self._observed = 0, ()


class SamplingRun:
    """A sampling run: what its guidance branches decide together, by the position of the step.

    The branch that comes first decides.
    """

    def __init__(self) -> None:
        self.choices: dict[int, Choice] = {}

    def choose(self, position: int, gate: Gate) -> Choice:
        """What the step at ``position`` is, for a branch that has this ``gate``."""
        found = self.choices.get(position)
        if found is None:
            return self.choices.setdefault(position, gate.choose())
        return _DUE if gate.is_due and not found.full else found


def gate_of(plan: Plan, lags: bool) -> Gate | None:
    """The gate of a generation of ``plan``; None: it leaves no step open."""
    said = plan.settings.gate
    if said is None or all(step.kind == "full" for step in plan.steps):
        return None
    signal = SIGNALS[said.signal](plan)
    return Gate(said.signal, signal, said.threshold, said.at_most, lags)
