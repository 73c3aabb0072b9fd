"""What each image has to be: itself, computed alone; and how much of it could have been cached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toca_fx.runtime.clock import Decision, Progress
from toca_fx.runtime.gate import Choice, SamplingRun
from toca_fx.runtime.generation import Generation
from toca_fx.runtime.generations import owned_by_caller
from toca_fx.runtime.report import StepRecord
from toca_fx.runtime.runner import Runner

# Why a step that the plan caches cannot be; nobody could tell what it is.
UNSEEN = "the first run of an untold schedule"
REPEATED = "calls at one timestep or back to a higher one, and nobody told the timesteps"
REBUILT = "conditions made anew at every call, and no session or branch to tell them apart"
SHARED = "another run has the same conditions, and no session tells them apart"
TWICE = "two calls of one step have the same conditions, and no branch tells them apart"
LOST = "the call before it failed"
WEIGHTS = "weights changed since the call before"
SHAPE = "the shape or the dtype changed since the call before"
MISPRINT = "at a timestep that its session does not list"
PAUSED = "the branch missed the step before it"
ANOTHERS = "in a session that was told the steps of another run"
REPLACED = "other weights are another model, which has what is left of a shared session's steps"
FORKED = "two schedules that were seen begin alike"

make_step = Generation.run_step


class WrongImageError(AssertionError):
    """A step did not give what the same generation gives alone."""


@dataclass
class Made:
    """A step as the runtime made it: what it decided, and the flat inputs that it was given.

    ``begins`` says that it took nothing from the steps before: they were lost, or in doubt.
    """

    generation: Generation
    decision: Decision
    begins: bool
    timestep: Any
    inputs: Sequence[Any]
    record: StepRecord

    @property
    def cached(self) -> bool:
        return self.record.kind != "full"


class Alone:
    """A generation in fresh state: it repeats the steps of one image, by their kinds only.

    It has seen no other image. What a gate decided is repeated, and not decided again. A full step
    that took nothing from the steps before it begins it anew, so that nothing older can be read.
    """

    def __init__(self) -> None:
        self._twin: Generation | None = None
        self._of: tuple[bytes, int] | None = None
        self._position = -1

    def repeat(self, made: Made) -> Any:
        """The output of this step; None if the image has no memories that it may read."""
        plan, position = made.generation.plan, made.decision.position
        program = made.generation.runner.program
        of = (program.analysis.code, len(plan.steps))
        decision = Decision("on", position, len(plan.steps), full=made.begins)
        if made.begins:
            runner, owner, run = Runner(program, made.inputs), owned_by_caller(), SamplingRun()
            self._twin = Generation(runner, plan, decision, (), (), run, owner, None, _silent)
            self._of = of
        elif self._twin is None or self._of != of or position != self._position + 1:
            return None
        elif self._twin.runner.program is not program:  # captured again: the code is the same
            self._twin.move(Runner(program, made.inputs), plan)
        self._position = position
        self._twin.run.choices[position] = Choice(not made.cached, made.record.reason)
        # It goes on for ever: it gives its memories back when it is dropped.
        self._twin.progress = Progress(10**6, position, calls=1, lost=made.begins)
        if self._twin.conditioning is not None:
            lost = self._twin.progress
            self._twin.forget()  # what is hoisted is computed again at every step
            self._twin.progress = lost
        return make_step(self._twin, decision, made.timestep, made.inputs)[0]


def _silent(_: str) -> None:
    pass


@dataclass
class Call:
    """One call of an image: which step of its run, what was made of it, why it is set aside.

    ``cached`` says that nothing kept it from being cached, but perhaps a gate.
    """

    number: int
    timestep: float
    cached: bool
    planned_full: bool
    reason: str | None


@dataclass
class Image:
    """The calls that belong to one run and one branch of it."""

    name: str
    alone: Alone = field(default_factory=Alone)
    calls: list[Call] = field(default_factory=list)
    doubtful: bool = False  # documented: it cannot be told from another
    lost: str | None = None
    known: tuple[float, ...] | None = None  # the schedule it was taken to have, at its last call
    broken: bool = False  # its trail of timesteps, for whoever recognises it

    @property
    def cacheable(self) -> int:
        return sum(not call.planned_full and call.reason is None for call in self.calls)

    @property
    def cached(self) -> int:
        """Those that were cached of the cacheable ones.

        A run may be planned from another step on (weights replaced in its middle): they are
        counted, not compared one by one.
        """
        return min(self.cacheable, sum(call.cached and call.reason is None for call in self.calls))

    @property
    def trail(self) -> tuple[float, ...]:
        return tuple(call.timestep for call in self.calls)


@dataclass
class Figures:
    """Steps of many sequences."""

    sequences: int = 0
    calls: int = 0
    cached: int = 0
    cacheable: int = 0
    aside: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, image: Image) -> int:
        """Count an image; returns how many steps were missed."""
        self.calls += len(image.calls)
        self.cached += image.cached
        self.cacheable += image.cacheable
        for call in image.calls:
            if call.reason is not None and not call.planned_full and not call.cached:
                self.aside[call.reason] += 1
        missed = image.cacheable - image.cached
        if missed:
            self.missed[kind] += missed
        return missed

    @property
    def share(self) -> float:
        return self.cached / max(self.cacheable, 1)

    def __str__(self) -> str:
        lines = [
            f"{self.sequences} sequences, {self.calls} calls: {self.cached} of {self.cacheable} "
            f"cacheable steps cached ({self.share:.1%})"
        ]
        lines += [f"  aside {count:5d}: {reason}" for reason, count in self.aside.most_common()]
        lines += [f"  missed {count:4d}: {kind}" for kind, count in self.missed.most_common(15)]
        return "\n".join(lines)


def off_by(output: Tensor, expected: Any) -> float:
    found = expected[0] if isinstance(expected, (tuple, list)) else expected
    return float((output - found).abs().max()) if output.isfinite().all() else torch.inf
