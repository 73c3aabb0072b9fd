"""A run of the user's: its branches, prompts and steps, and what is known of each call."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import toca_fx
from tests.system.runtime.driver import oracle
from tests.system.runtime.driver.events import GUIDANCE, REPEATING, Failure, Sampling
from tests.system.runtime.driver.hosts import AbandonedError
from tests.system.runtime.driver.oracle import Call, Image, Made, WrongImageError, off_by

if TYPE_CHECKING:
    from tests.system.runtime.driver.world import Play


class Interrupt(BaseException):
    """As Ctrl-C: it may come anywhere in a call."""


class OneRun:
    """A run of the user's: its branches, prompts and steps."""

    def __init__(self, play: Play, at: int, spec: Sampling) -> None:
        self.world_play, self.at, self.spec, self.place = play, at, spec, spec.place
        self.times = spec.times
        self.steps = len(self.times) if spec.stop is None else min(spec.stop, len(self.times))
        self.images: dict[tuple[str, ...], Image] = {}
        self.prompts: dict[str, Tensor] = {}
        self.handle: Any = None
        self.busy = self.over = False
        self.replanned = False
        self.given = spec.failures
        self.leader, self.swaps = "", False  # the branch that a step begins with

    @property
    def kind(self) -> str:
        """What it is, where steps were missed."""
        return f"outer {self.world_play.sequence.outer}, {self.spec}"

    @property
    def untold(self) -> bool:
        """Whether it has no session, not even somebody else's."""
        inherits = self.place[1] not in ("thread", "threads")
        return self.place[0] == "none" and not (
            inherits and self.world_play.sequence.outer != "none"
        )

    @property
    def outer_is_another(self) -> bool:
        """Whether it is in a session that was told of a run with other steps."""
        if self.place[0] != "none" or self.untold:
            return False
        sequence = self.world_play.sequence
        first = sequence.samplings[0].times
        if sequence.outer == "one list":
            return self.times != first
        return sequence.outer == "one number" and len(self.times) != len(first)

    @property
    def lists(self) -> bool:
        """Whether its session lists the timesteps of all its calls."""
        return self.place[0] != "none" and self.spec.told in ("timesteps", "misprint")

    @property
    def is_told(self) -> bool:
        """Whether its session knows which step each call is."""
        spec = self.spec
        alike = spec.guidance == "perturbed" or "rebuilt" in (spec.prompt, spec.negative)
        if self.place[0] == "none" or self.replanned or (alike and not spec.named):
            return False
        return self.lists or (spec.told == "number" and spec.schedule not in REPEATING)

    def open(self) -> AbstractContextManager[Any]:
        spec, times = self.spec, self.times
        if spec.told == "number":
            opened = toca_fx.session(len(times))
        elif spec.told == "wrong":  # in other units
            opened = toca_fx.session(timesteps=[time / 1000 + 7 for time in times])
        else:
            listed = [float(time) for time in times]
            if spec.told == "misprint" and len(listed) > 2:
                listed[2] += 0.037 if max(times) <= 1 else 6
            opened = toca_fx.session(timesteps=listed)
        self.handle = _Weakly(opened)
        return opened

    def step(self, number: int) -> None:
        """All calls of one step."""
        branches = GUIDANCE[self.spec.guidance]
        names = [name for name, when in branches.items() if when is None or number in when]
        if self.spec.first == "uncond" and "uncond" in names:
            names = ["uncond", *(name for name in names if name != "uncond")]
        batch = self.spec.batch
        if self.spec.halves is not None and number >= self.spec.halves:
            if batch != 1 and number == self.spec.halves:
                self.prompts.clear()
                self.changed("halves")
            batch = 1
        # One that is made anew at every call may be the next of another branch.
        self.swaps = bool(names) and self.leader not in ("", names[0])
        self.leader = names[0] if names else self.leader
        for tile in ("left", "right") if self.spec.tiles else ("",):
            x = self.world_play.latents(batch)
            for at, name in enumerate(names):
                self.call(number, at, (tile, name) if tile else (name,), x, batch)

    def call(self, number: int, at: int, path: tuple[str, ...], x: Tensor, batch: int) -> None:
        world = self.world_play.world
        image = self.images.setdefault(path, Image(f"run {self.at} {'/'.join(path)}"))
        time = self.times[number]
        whole = all(isinstance(each, int) for each in self.times)
        t = torch.full((batch,), time, dtype=torch.int64 if whole else torch.float32)
        y = self.prompt(path[-1], batch)
        failure = next(
            (each for each in self.given if (each.step, each.branch) == (number, at)), None
        )
        if failure is not None:
            self.given = tuple(each for each in self.given if each is not failure)
            self.fail(failure, image, path, (x, t, y))
        world.made.clear()
        with self.branch(path):
            output = world.call(world.twin, x, t, y)
        (made,) = world.made
        self.check(image, path, number, made, output, (x, t, y))
        world.made.clear()

    def prompt(self, branch: str, batch: int) -> Tensor:
        spec = self.spec
        if branch == "third" and spec.guidance == "perturbed":
            branch = "cond"
        what = spec.prompt if branch == "cond" else spec.negative if branch == "uncond" else "own"
        length = spec.length if branch == "cond" else 6
        if branch not in self.prompts:
            self.prompts[branch] = self.world_play.condition(what, 0, batch, length)
        found = self.prompts[branch]
        return found.clone() if what == "rebuilt" else found

    def branch(self, path: tuple[str, ...]) -> AbstractContextManager[Any]:
        told = ExitStack()
        if self.spec.named:
            for name in path:
                told.enter_context(toca_fx.branch(name))
        return told

    def fail(
        self, failure: Failure, image: Image, path: tuple[str, ...], inputs: tuple[Tensor, ...]
    ) -> None:
        world, play = self.world_play.world, self.world_play
        world.made.clear()
        world.fuse.inner, world.fuse.line = failure.line == 0, failure.line
        failed = False
        try:
            with self.branch(path):
                world.call(world.twin, *inputs)
        except Interrupt:
            failed = True
        finally:
            world.fuse.inner, world.fuse.line = False, 0
        play.log.append(f"  {image.name} t={float(inputs[1][0]):g}: {failure}, failed: {failed}")
        image.lost = image.lost or oracle.LOST
        image.doubly = True
        if failure.gives_up:
            raise AbandonedError

    def changed(self, how: str) -> None:
        """Weights or shapes are others from now on."""
        if how == "other dtype" and self.world_play.world.kind == "text":
            self.prompts.clear()
        shape = how in ("other dtype", "halves")
        for image in self.images.values():
            if image.calls:
                image.lost = oracle.SHAPE if shape else oracle.WEIGHTS
                if shape or how == "replace":
                    image.broken = True
        self.replanned |= how == "replace"

    # The oracle

    def check(
        self,
        image: Image,
        path: tuple[str, ...],
        number: int,
        made: Made,
        output: Tensor,
        inputs: tuple[Tensor, ...],
    ) -> None:
        play, world = self.world_play, self.world_play.world
        time = self.times[number]
        planned = made.generation.runner.program.analysis.plan(len(self.times))
        full = planned.steps[number].kind == "full" or not image.calls
        reason = self.reason(image, path, number, inputs[2])
        # A gate may have made it full; it could have been cached.
        free = made.cached or (planned.settings.gate is not None and not made.begins)
        image.calls.append(Call(number, time, free, full, reason))
        image.lost = None
        play.log.append(
            f"  turn {play.turn} {image.name} step {number} t={time:g}: {made.record.kind} at "
            f"{made.decision.position} of {made.decision.num_steps}, {made.record.reason}"
            + (f" ({reason})" if reason and not full else "")
        )
        tolerance = 1e-9 if world.dtype == torch.float64 else 1e-3
        alone = image.alone.repeat(made)
        if not made.cached:
            expected = world.call(world.model, *inputs)
            if not off_by(output, expected) <= tolerance:
                raise WrongImageError(
                    f"{image.name} step {number}: full, and not the model's output"
                )
        elif image.doubtful:
            return
        elif alone is None:
            raise WrongImageError(f"{image.name} step {number}: cached on memories of another step")
        elif self.is_told and made.decision.position != number:
            position = made.decision.position
            raise WrongImageError(f"{image.name} step {number}: cached as step {position}")
        if alone is not None and not off_by(output, alone) <= tolerance:
            error = off_by(output, alone)
            raise WrongImageError(f"{image.name} step {number}: {error:.1e} off the same run alone")
        outer = self.place[0] == "none" and not self.untold
        if number == len(self.times) - 1 and not outer and not image.broken:
            play.seen.add(image.trail)

    def reason(self, image: Image, path: tuple[str, ...], number: int, y: Tensor) -> str | None:
        """Why nobody can tell what this call is; None: it can be told."""
        spec = self.spec
        mine = spec.prompt if path[-1] == "cond" else spec.negative
        twice = spec.guidance == "perturbed" and not spec.named and path[-1] != "uncond"
        rebuilt = "rebuilt" in (spec.prompt, spec.negative) and not spec.named
        outer = self.place[0] == "none" and not self.untold
        shared = self.meets_another(image, path, number, y)
        image.doubtful |= (
            # Of a session that several runs share, it may be any of them.
            (outer and mine == "rebuilt") or (rebuilt and self.swaps)
        )
        paused = bool(image.calls) and image.calls[-1].number != number - 1
        guided = len(GUIDANCE[spec.guidance]) > 1
        misprinted = spec.told == "misprint" and self.place[0] != "none" and number in (2, 3)
        reasons = (
            (image.lost is not None, image.lost),
            (outer and self.replanned, oracle.REPLACED),
            (paused, oracle.PAUSED),
            (shared or image.doubtful, oracle.SHARED),
            (twice, oracle.TWICE),
            (self.outer_is_another, oracle.ANOTHERS),
            (self.place[0] == "none" and mine == "rebuilt", oracle.REBUILT),
            (rebuilt and (guided or spec.schedule in REPEATING), oracle.REBUILT),
            (spec.schedule in REPEATING and not self.lists, oracle.REPEATED),
            (misprinted, oracle.MISPRINT),
        )
        found = next((reason for holds, reason in reasons if holds), None)
        return self.unknown(image, number) if found is None and self.untold else found

    def unknown(self, image: Image, number: int) -> str | None:
        """Why the schedule of an untold run is not known at this call; None: it is."""
        # What is known by now: another branch, or another run, may just have come to its end.
        trail = (*image.trail, self.times[number])
        before, image.known = image.known, _longest(self.world_play.seen, trail)
        if image.broken or image.known is None or (before is None and image.calls):
            return oracle.UNSEEN
        return oracle.FORKED if before != image.known and image.calls else None

    def meets_another(self, image: Image, path: tuple[str, ...], number: int, y: Tensor) -> bool:
        """Whether another run has these very conditions, where no session tells them apart.

        If its last call may be the one before this one, nobody can tell whose memories are read.
        """
        if self.place[0] != "none":
            return False
        play, spec = self.world_play, self.spec
        scope = "none" if self.untold else "outer"
        key = (scope, path if spec.named else None, id(y))
        where = self.place[1]
        play.moving |= where in ("threads", "tasks")
        who = self.at if where in ("thread", "task") else where
        known = play.latest.setdefault(key, {})
        time, shared = self.times[number], False
        for other, (theirs, run, last) in list(known.items()):
            if theirs is image:
                continue
            moving = play.moving
            if other != who and not moving and not run.over:
                continue
            ended = len(theirs.calls) == len(run.times) or theirs.name == image.name
            if ended:
                continue
            shared = shared or not run.over
            onward = (time - last) * (-1 if spec.schedule != "rising" else 1) > 0
            if onward or "restart" in (spec.schedule, run.spec.schedule):
                image.doubtful = theirs.doubtful = True
        known[who] = (image, self, time)
        return shared


class _Weakly:
    """Invalidates a session that is still open, and keeps nothing alive."""

    def __init__(self, run: Any) -> None:
        self._session = run.session

    def invalidate(self) -> None:
        self._session.invalidate()


def _longest(seen: set[tuple[float, ...]], trail: tuple[float, ...]) -> tuple[float, ...] | None:
    return max((each for each in seen if each[: len(trail)] == trail), key=len, default=None)
