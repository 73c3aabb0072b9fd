"""Plays a sequence of events on a compiled twin, and holds every image to the same one alone."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

import toca_fx
from tests.helpers import make_policy, tiny
from tests.system.runtime.driver import oracle
from tests.system.runtime.driver.events import (
    GUIDANCE,
    REPEATING,
    Failure,
    Sampling,
    Sequence,
)
from tests.system.runtime.driver.hosts import Abandoned, Host, host_of
from tests.system.runtime.driver.oracle import Call, Figures, Image, Made, WrongImage, off_by
from toca_fx.runtime.context import current_session
from toca_fx.runtime.generation import Generation
from toca_fx.runtime.session import Session

FEATURES = ((64, 32), (16, 32))  # of the memories of either model; texts are shorter


class Interrupt(BaseException):
    """As Ctrl-C: it may come anywhere in a call."""


class Fuse:
    """Fails a call: in its inner backend, or at a line of toca_fx."""

    def __init__(self) -> None:
        self.inner = False
        self.line = 0

    def backend(self, graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        """An inner backend that writes rubbish into memories before it fails."""

        def run(*args: Any) -> Any:
            if self.inner:
                for value in args:
                    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                        if value.dim() == 3 and value.shape[1:] in FEATURES:
                            value.fill_(torch.nan)
                raise Interrupt
            return graph(*args)

        return run

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if "/toca_fx/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.line -= 1
            if self.line == 0:
                raise Interrupt
        return self.trace


class World:
    """A model, its twin, and all that happens to them.

    The twin is compiled once; each sequence has weights of its own, so that nothing is left of the
    one before.
    """

    def __init__(self, kind: str, **policy: Any) -> None:
        self.kind, self.fuse, self.figures = kind, Fuse(), Figures()
        self.model = tiny("original" if kind == "labels" else "cross", layers=1).double()
        sections = {"sampler": {"steps": 6}, "scores": {"staleness": 1.0}, **policy}
        self.twin: Any = toca_fx.compile(
            self.model, make_policy(**sections), inner=self.fuse.backend
        )
        self.dtype = torch.float64
        self.weights = {name: value.clone() for name, value in self.model.named_parameters()}
        self.made: list[Made] = []
        self.kept: list[Tensor] = []
        self.captured: set[tuple[Any, ...]] = set()
        self.tells: Callable[[Image, Play], None] | None = None  # of steps that were missed

    def play(self, sequence: Sequence) -> None:
        """Play it.

        Raises:
            WrongImage: a step is not what the same generation gives alone.
        """
        Play(self, sequence).play()

    def capture(self, sequence: Sequence) -> None:
        """Capture the model for all inputs of a sequence.

        Here, because Dynamo's limit on captures is another one in other threads.
        """
        dtypes = [torch.float64]
        if any(how == "other dtype" for _, how in sequence.weights):
            dtypes.append(torch.float32)
        for dtype, each in itertools.product(dtypes, sequence.samplings):
            whole = all(isinstance(time, int) for time in each.times)
            batches = {each.batch, 1 if each.halves is not None else each.batch}
            lengths = {6, each.length} if self.kind == "text" else {0}
            for key in itertools.product(batches, lengths, [whole], [dtype]):
                if key not in self.captured:
                    self.captured.add(key)
                    self._capture(*key)

    def _capture(self, batch: int, length: int, whole: bool, dtype: torch.dtype) -> None:
        if self.dtype != dtype:
            self.change("other dtype")
        side = 8 if length else 16
        t = torch.ones(batch, dtype=torch.int64 if whole else torch.float32)
        y = torch.zeros(batch, length, 32, dtype=dtype) if length else torch.ones_like(t).long()
        with toca_fx.session(1):
            self.call(self.twin, torch.zeros(batch, 4, side, side, dtype=dtype), t, y)

    def call(self, model: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x, t=t, y=y).clone()

    # Weights

    def renew(self) -> None:
        """Other tensors with the first values."""
        if self.dtype != torch.float64:
            self.change("other dtype")
        self.kept.clear()
        self._set(lambda name, _: self.weights[name].clone())

    def change(self, how: str) -> None:
        if how == "write":
            with torch.no_grad():
                for value in self.model.parameters():
                    value.mul_(1.03)
        elif how == "replace":
            self._set(lambda _, value: value.detach() * 1.03)
        elif how == "other dtype":
            self.dtype = torch.float32 if self.dtype == torch.float64 else torch.float64
            self.model.to(self.dtype)
        else:
            for value in self.model.parameters():
                if how == "unseen write":
                    value.data.mul_(1.03)
                else:
                    # An address that is given out again, to the same weight, is not seen.
                    self.kept.append(value.data)
                    value.data = value.data * (1.03 if how == "data" else 1)

    def _set(self, made: Callable[[str, Tensor], Tensor]) -> None:
        for prefix, module in self.model.named_modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    new = made(f"{prefix}.{name}".lstrip("."), value)
                    setattr(module, name, nn.Parameter(new, requires_grad=False))

    # What the runtime does

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note every step that is made; a call fails where its fuse says so."""
        world, call = self, Session.call

        def run_step(of: Generation, decision: Any, timestep: Any, inputs: Any) -> Any:
            found = oracle.make_step(of, decision, timestep, inputs)
            world.made.append(Made(of, decision, timestep, inputs, found[1]))
            return found

        def call_traced(session: Session, *args: Any) -> Any:
            if not world.fuse.line:
                return call(session, *args)
            before = sys.gettrace()
            sys.settrace(world.fuse.trace)
            try:
                return call(session, *args)
            finally:
                sys.settrace(before)

        with (
            patch.object(Generation, "run_step", run_step),
            patch.object(Session, "call", call_traced),
        ):
            yield


class Play:
    """One sequence."""

    def __init__(self, world: World, sequence: Sequence) -> None:
        self.world, self.sequence = world, sequence
        self.random = torch.Generator().manual_seed(sequence.seed)
        self.loop = asyncio.new_event_loop()
        self.hosts: dict[int, Host] = {}
        self.depth = self.turn = 0
        self.moving = False  # an untold run has gone from thread to thread: they tell nothing
        self.log: list[str] = []
        self.pool: dict[tuple[Any, ...], Tensor] = {}
        self.seen: set[tuple[float, ...]] = set()  # schedules that were run whole
        self.latest: dict[tuple[Any, ...], dict[Any, tuple[Image, OneRun, float]]] = {}
        self.runs = [OneRun(self, at, each) for at, each in enumerate(sequence.samplings)]
        self.turns = deque(sequence.turns)

    def play(self) -> None:
        world = self.world
        current_session().close()
        world.capture(self.sequence)
        world.renew()
        try:
            with world.watched(), self.outer():
                self.take_turns()
        except WrongImage as error:
            raise WrongImage(f"{error}\n{self.sequence}\n" + "\n".join(self.log)) from None
        finally:
            for host in self.hosts.values():
                host.end()
            self.loop.close()
        world.figures.sequences += 1
        for run in self.runs:
            for image in run.images.values():
                if world.figures.add(run.kind, image) and world.tells is not None:
                    world.tells(image, self)

    def outer(self) -> AbstractContextManager[Any]:
        """The session that is open all the while."""
        first = self.sequence.samplings[0]
        if self.sequence.outer == "one number":
            return toca_fx.session(len(first.times))
        if self.sequence.outer == "one list":
            return toca_fx.session(timesteps=first.times)
        if self.sequence.outer == "all":
            return toca_fx.session(sum(len(each.times) for each in self.sequence.samplings))
        return nullcontext()

    def take_turns(self) -> None:
        while self.turns:
            self.advance(self.turns.popleft())

    def between(self) -> None:
        """Inside of somebody's session: those that have their own make a step or two."""
        self.depth += 1
        postponed = []
        for _ in range(2):
            if self.turns:
                at = self.turns.popleft()
                if self.sequence.samplings[at].place[0] == "none":
                    postponed.append(at)
                else:
                    self.advance(at)
        self.turns.extendleft(reversed(postponed))
        self.depth -= 1

    def advance(self, at: int) -> None:
        run = self.runs[at]
        host = self.hosts.get(at)
        if host is None:
            if run.place == ("block", "main") and self.depth > 2:
                return
            host = host_of(run, run.place, self.loop, self.between)
            self.hosts[at] = host
        if host.done or run.busy:
            return
        for when, how in self.sequence.weights:
            if when == self.turn:
                self.change(how)
        self.turn += 1
        run.busy = True
        try:
            host.advance()
        finally:
            run.busy = False
        if host.done:
            run.over = True

    def change(self, how: str) -> None:
        self.log.append(f"  weights: {how}")
        self.world.change(how)
        if how == "unseen write":
            for run in self.runs:
                if run.handle is not None:
                    run.handle.invalidate()
            current_session().invalidate()
        for run in self.runs:
            run.changed(how)
        if how == "replace":
            self.seen.clear()  # another model

    def condition(self, what: str, number: int, batch: int, length: int) -> Tensor:
        """A prompt: labels, or a text."""
        key = (what, number, batch, length, self.world.dtype)
        if what.startswith("pool") and key in self.pool:
            return self.pool[key]
        if self.world.kind == "labels":
            made = torch.randint(0, 11, (batch,), generator=self.random)
        else:
            made = torch.randn(batch, length, 32, generator=self.random, dtype=torch.float64)
            made = made.to(self.world.dtype)
        if what.startswith("pool"):
            self.pool[key] = made
        return made

    def latents(self, batch: int) -> Tensor:
        side = 16 if self.world.kind == "labels" else 8
        made = torch.randn(batch, 4, side, side, generator=self.random, dtype=torch.float64)
        return made.to(self.world.dtype)


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
        play, world = self.world_play, self.world_play.world
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
            raise Abandoned

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
        image.calls.append(Call(number, time, made.cached, full, reason))
        image.lost = None
        play.log.append(
            f"  turn {play.turn} {image.name} step {number} t={time:g}: {made.record.kind} at "
            f"{made.decision.position} of {made.decision.num_steps}"
            + (f" ({reason})" if reason and not full else "")
        )
        tolerance = 1e-9 if world.dtype == torch.float64 else 1e-3
        alone = image.alone.repeat(made)
        if not made.cached:
            expected = world.call(world.model, *inputs)
            if not off_by(output, expected) <= tolerance:
                raise WrongImage(f"{image.name} step {number}: full, and not the model's output")
        elif image.doubtful:
            return
        elif alone is None:
            raise WrongImage(f"{image.name} step {number}: cached on memories of another step")
        elif self.is_told and made.decision.position != number:
            position = made.decision.position
            raise WrongImage(f"{image.name} step {number}: cached as step {position}")
        if alone is not None and not off_by(output, alone) <= tolerance:
            error = off_by(output, alone)
            raise WrongImage(f"{image.name} step {number}: {error:.1e} off the same run alone")
        outer = self.place[0] == "none" and not self.untold
        if number == len(self.times) - 1 and not outer and not image.broken:
            play.seen.add(image.trail)

    def reason(self, image: Image, path: tuple[str, ...], number: int, y: Tensor) -> str | None:
        """Why nobody can tell what this call is; None: it can be told."""
        spec, play, time = self.spec, self.world_play, self.times[number]
        branches = GUIDANCE[spec.guidance]
        mine = spec.prompt if path[-1] == "cond" else spec.negative
        rebuilt = "rebuilt" in (spec.prompt, spec.negative)
        shared = self.meets_another(image, path, number, y)
        twice = spec.guidance == "perturbed" and not spec.named and path[-1] != "uncond"
        if twice and spec.schedule in REPEATING:
            image.doubtful = True  # a timestep that is listed twice may be that of either call
        outer = self.place[0] == "none" and not self.untold
        if outer and mine == "rebuilt":
            image.doubtful = True  # of a session that several runs share, it may be any of them
        if self.swaps and not spec.named and "rebuilt" in (spec.prompt, spec.negative):
            image.doubtful = True
        if image.lost is not None:
            return image.lost
        if outer and self.replanned:
            return oracle.REPLACED
        if image.calls and image.calls[-1].number != number - 1:
            return oracle.PAUSED
        if shared or image.doubtful:
            return oracle.SHARED
        if twice:
            return oracle.TWICE
        if self.outer_is_another:
            return oracle.ANOTHERS
        if rebuilt and self.place[0] == "none" and mine == "rebuilt":
            return oracle.REBUILT
        if rebuilt and not spec.named and len(branches) > 1:
            return oracle.REBUILT
        if spec.schedule in REPEATING and not self.lists:
            return oracle.REPEATED
        if spec.told == "misprint" and self.place[0] != "none" and number in (2, 3):
            return oracle.MISPRINT
        if self.untold:
            # What is known by now: another branch, or another run, may just have come to its end.
            before, image.known = image.known, _longest(play.seen, (*image.trail, time))
            if image.broken or image.known is None or (before is None and image.calls):
                return oracle.UNSEEN
            if before != image.known and image.calls:
                return oracle.FORKED
        return None

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
            if onward:
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
