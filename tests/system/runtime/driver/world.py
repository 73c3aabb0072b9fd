"""Plays a sequence of events on a compiled twin, and holds every image to the same one alone."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

import toca_fx
from tests.helpers import make_policy, tiny
from tests.system.runtime.driver import oracle
from tests.system.runtime.driver.events import (
    Sequence,
)
from tests.system.runtime.driver.hosts import Host, host_of
from tests.system.runtime.driver.oracle import Figures, Image, Made, WrongImageError
from tests.system.runtime.driver.runs import Interrupt, OneRun
from toca_fx.runtime.context import current_session
from toca_fx.runtime.generation import Generation
from toca_fx.runtime.session import Session

FEATURES = ((64, 32), (16, 32))  # of the memories of either model; texts are shorter


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
                    memory = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
                    if memory and value.dim() == 3 and value.shape[1:] in FEATURES:
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
            WrongImageError: a step is not what the same generation gives alone.
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
            begins = decision.full or of.progress.lost
            found = oracle.make_step(of, decision, timestep, inputs)
            world.made.append(Made(of, decision, begins, timestep, inputs, found[1]))
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
        except WrongImageError as error:
            raise WrongImageError(f"{error}\n{self.sequence}\n" + "\n".join(self.log)) from None
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
