"""Where the steps of a run are made: at once, in threads, tasks, generators."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class AbandonedError(Exception):
    """A run that gives up after a failure."""


class Run(Protocol):
    """What a host needs of a run."""

    steps: int

    def open(self) -> AbstractContextManager[Any]: ...

    def step(self, number: int) -> None: ...


def in_thread(body: Callable[[], None]) -> None:
    """Run ``body`` in a new thread, and wait for it."""
    failed: list[BaseException] = []

    def caught() -> None:
        try:
            body()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


class Host:
    """Makes one step of ``run`` at each ``advance``; everybody waits for it."""

    def __init__(self, run: Run) -> None:
        self.run, self.made, self.done = run, 0, run.steps == 0

    def advance(self) -> None:
        try:
            self.make_step()
        except AbandonedError:
            self.done = True
        self.made += 1
        if self.made >= self.run.steps:
            self.done = True
        if self.done:
            self.end()

    def make_step(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Clean up; it may come again."""


class StepByStep(Host):
    """Each step by itself: where ``through`` puts it, in a session that is held."""

    def __init__(self, run: Run, through: Callable[[Callable[[], None]], None], held: bool) -> None:
        super().__init__(run)
        self.through = through
        self.session = run.open() if held else nullcontext()

    def make_step(self) -> None:
        def body() -> None:
            with self.session:
                self.run.step(self.made)

        self.through(body)

    def end(self) -> None:
        self.session = nullcontext()  # dropped


class InOneThread(Host):
    """A thread that runs the loop, with its session around it or around each step, or none."""

    def __init__(self, run: Run, session: str) -> None:
        super().__init__(run)
        self.session = session
        self.turn, self.reply = threading.Semaphore(0), threading.Semaphore(0)
        self.failed: BaseException | None = None
        self.stopped = False
        self.thread = threading.Thread(target=self._body, daemon=True)
        self.thread.start()

    def _body(self) -> None:
        held = self.run.open() if self.session == "handle" else None
        try:
            with self.run.open() if self.session == "block" else nullcontext():
                for number in range(self.run.steps):
                    self.turn.acquire()
                    if self.stopped:
                        break
                    with held or nullcontext():
                        self.run.step(number)
                    if number < self.run.steps - 1:
                        self.reply.release()
        except BaseException as error:
            self.failed = error
        self.reply.release()

    def make_step(self) -> None:
        self.turn.release()
        self.reply.acquire()
        if self.failed is not None:
            failed, self.failed = self.failed, None
            raise failed

    def end(self) -> None:
        self.stopped = True
        self.turn.release()
        self.thread.join()


class InOneTask(Host):
    """As ``InOneThread``, in a task of ``loop``; ``away`` runs the steps in threads of it."""

    def __init__(
        self, run: Run, session: str, loop: asyncio.AbstractEventLoop, away: bool = False
    ) -> None:
        super().__init__(run)
        self.session, self.loop, self.away = session, loop, away
        self.turn, self.reply = asyncio.Semaphore(0), asyncio.Semaphore(0)
        self.stopped = False
        self.pools: list[ThreadPoolExecutor] = []
        self.task = loop.create_task(self._body())

    async def _body(self) -> None:
        held = self.run.open() if self.session == "handle" else None
        try:
            with self.run.open() if self.session == "block" else nullcontext():
                for number in range(self.run.steps):
                    await self.turn.acquire()
                    if self.stopped:
                        break
                    with held or nullcontext():
                        if self.away:
                            # Always another thread, as in a pool that is busy.
                            self.pools.append(ThreadPoolExecutor(1))
                            self.loop.set_default_executor(self.pools[-1])
                            await asyncio.to_thread(self.run.step, number)
                        else:
                            self.run.step(number)
                    if number < self.run.steps - 1:
                        self.reply.release()
        finally:
            self.reply.release()

    def make_step(self) -> None:
        async def once() -> None:
            self.turn.release()
            await self.reply.acquire()
            if self.made == self.run.steps - 1:
                await asyncio.wait([self.task])

        self.loop.run_until_complete(once())
        if self.task.done():
            self.task.result()

    def end(self) -> None:
        async def last() -> None:
            self.stopped = True
            self.turn.release()
            await asyncio.wait([self.task])

        self.loop.run_until_complete(last())
        for pool in self.pools:
            pool.shutdown()


class InGenerator(Host):
    """A generator function with a session of its own, asked on from ``through``."""

    def __init__(self, run: Run, through: Callable[[Callable[[], None]], None]) -> None:
        super().__init__(run)
        self.through = through
        self.generator: Iterator[None] | None = self._body()

    def _body(self) -> Iterator[None]:
        with self.run.open():
            for number in range(self.run.steps):
                self.run.step(number)
                yield

    def make_step(self) -> None:
        generator = self.generator
        assert generator is not None
        self.through(lambda: next(generator))
        if self.made == self.run.steps - 1:
            self.through(lambda: next(generator, None))

    def end(self) -> None:
        self.generator = None


class AllAtOnce(Host):
    """A with statement around the loop; ``between`` lets others make steps inside of it."""

    def __init__(self, run: Run, between: Callable[[], None]) -> None:
        super().__init__(run)
        self.between = between

    def make_step(self) -> None:
        self.done = True
        with self.run.open():
            for number in range(self.run.steps):
                self.run.step(number)
                self.between()


def directly(body: Callable[[], None]) -> None:
    body()


def host_of(
    run: Run, place: tuple[str, str], loop: asyncio.AbstractEventLoop, between: Callable[[], None]
) -> Host:
    """What makes the steps of ``run`` at its ``place``."""
    session, where = place

    def in_task(body: Callable[[], None]) -> None:
        async def once() -> None:
            body()

        loop.run_until_complete(once())

    through = {"main": directly, "threads": in_thread, "tasks": in_task}
    if session == "generator":
        return InGenerator(run, through[where])
    if where == "thread":
        return InOneThread(run, session)
    if where in ("task", "to_thread"):
        return InOneTask(run, session, loop, where == "to_thread")
    if session == "block":
        return AllAtOnce(run, between)
    return StepByStep(run, through[where], session == "handle")
