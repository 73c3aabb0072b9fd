"""Whose step it is: the sessions and branches that a call is made in."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from toca_fx.diagnostics import MOST_STEPS, number_of_steps
from toca_fx.runtime.clock import Told
from toca_fx.runtime.report import Report
from toca_fx.runtime.schedules import Schedule
from toca_fx.runtime.session import Session
from toca_fx.runtime.timesteps import one_or_all

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


@dataclass(eq=False)
class _Entry:
    """A session that was entered, by the frame of that number.

    A generator that enters one is ``stepwise`` if it calls the model itself, and not whoever waits
    for it (``contextlib.contextmanager``, a fixture): then its session is for its own calls only.
    """

    session: Session
    frame: int
    generator: bool
    left: bool = False
    stepwise: bool = False


_entered: ContextVar[tuple[_Entry, ...]] = ContextVar("toca_fx_sessions", default=())
# A generator's frame is found wherever it goes on, also in another thread or context.
_generators: dict[int, list[_Entry]] = {}
_implicit = Session(implicit=True)


@dataclass(eq=False)
class _Branch:
    """A branch that was entered, and what was told with it.

    If a generator has entered it, it is for that generator's own calls: ``frame`` is its number.
    """

    name: str
    told: Told | None
    frame: int | None


# From the outside in.
_branches: ContextVar[tuple[_Branch, ...]] = ContextVar("toca_fx_branches", default=())


def current_session() -> Session:
    """The innermost session that was entered and not left, else the one for all other calls."""
    entered = [entry for entry in _entered.get() if not entry.left]
    if not entered and not _generators:
        return _implicit
    on_stack = _generator_on_stack(entered)
    if on_stack is not None:
        on_stack.stepwise = True
        return on_stack.session
    others = [entry for entry in entered if not entry.stepwise]
    return others[-1].session if others else _implicit


def _generator_on_stack(entered: Sequence[_Entry]) -> _Entry | None:
    """The session of a generator that runs now, unless another was entered further in."""
    frames = {entry.frame: entry for entry in entered if not entry.generator}
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        found = _generators.get(id(frame))
        if found and not found[-1].session.closed:
            return found[-1]
        if id(frame) in frames:
            return None
        frame = frame.f_back
    return None


def _enter(session: Session, caller: FrameType) -> _Entry:
    is_generator = bool(caller.f_code.co_flags & _GENERATORS) and not _for_others(caller)
    entry = _Entry(session, id(caller), is_generator)
    if is_generator:
        _generators.setdefault(entry.frame, []).append(entry)
    _entered.set((*(each for each in _entered.get() if not each.left), entry))
    return entry


def _for_others(generator: FrameType) -> bool:
    """Whether a generator runs for the body of a ``with`` statement, or is a fixture."""
    waits = generator.f_back
    file = "" if waits is None else waits.f_code.co_filename
    return file == contextlib.__file__ or file.endswith("fixtures.py")


def _leave(entry: _Entry) -> None:
    entry.left = True  # wherever it was entered: the context there cannot be changed from here
    _entered.set(tuple(each for each in _entered.get() if not each.left))
    if entry.generator:
        rest = [each for each in _generators.get(entry.frame, ()) if not each.left]
        if rest:
            _generators[entry.frame] = rest
        else:
            _generators.pop(entry.frame, None)


class Run:
    """A session that was opened: what ``with toca_fx.session(...) as run`` gives.

    It can be entered again and again, on any thread or task: ``with run:`` around each step. The
    innermost one that was entered counts. Leaving it closes nothing.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._entries: list[_Entry] = []

    def __enter__(self) -> Run:
        self._entries.append(_enter(self.session, sys._getframe(1)))
        return self

    def __exit__(self, *failure: object) -> None:
        _leave(self._take(id(sys._getframe(1))))

    def _take(self, frame: int) -> _Entry:
        """The entry to leave: that of this frame or context. Others may have entered too."""
        own = [entry for entry in self._entries if entry.frame == frame]
        here = [entry for entry in self._entries if entry in _entered.get()]
        entry = (own or here or self._entries)[-1]
        self._entries.remove(entry)
        return entry

    @property
    def num_steps(self) -> int | None:
        """The number of model calls; None: that of the policy."""
        return self.session.num_steps

    def report(self) -> Report:
        """What has been done so far."""
        return self.session.report()

    def invalidate(self) -> None:
        """Read nothing that was computed so far: the next step of each branch is full.

        For writes to weights and captions that nobody can see: through ``.data``, numpy or dlpack
        to the memory they have, and any to tensors made in inference mode.
        """
        self.session.invalidate()

    def close(self) -> None:
        """End the run and free its memories; the report stays. A call in it is an error then."""
        self.session.close()


class Handle(Run):
    """A session as it is opened; the run ends with it.

    ``with toca_fx.session(...) as run`` drops it at the end of the block. Who keeps it (``run =
    toca_fx.session(...)``) may enter it again and again; the run ends when it is dropped or closed.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._entered = self._failed = False

    def __enter__(self) -> Run:
        self._entries.append(_enter(self.session, sys._getframe(1)))
        self._entered = True
        return Run(self.session)

    def __exit__(self, *failure: object) -> None:
        _leave(self._take(id(sys._getframe(1))))
        self._failed = failure[0] is not None

    def __del__(self) -> None:
        session: Session | None = getattr(self, "session", None)
        for entry in getattr(self, "_entries", ()):  # an interrupt may have come in between
            _leave(entry)
        if session is None or session.closed:
            return
        if self._entered and not self._failed and not sys.is_finalizing():
            session.complete()
        session.close()


def session(
    num_steps: int | None = None, *, timesteps: Sequence[Any] | Tensor | None = None
) -> Run:
    """One sampling run: every toca-compiled model called inside has new memories and a new clock.

    ``num_steps`` is the number of model calls of the run (per guidance branch), by default the
    policy's ``sampler.steps``. ``timesteps`` are the values of the model's timestep argument, call
    by call ([T], or [T, rows] where rows or frames have their own): values that depend only on them
    and the conditions, such as the modulations of all blocks, are then computed for all steps at
    once, if they fit into the policy's ``hoisting.memory``; and the calls of second-order samplers
    are known for what they are.

    ``with toca_fx.session(...) as run:`` ends with its block. Where the loop is not in one place (a
    server, a generator, worker threads), keep it, ``run = toca_fx.session(...)``, and enter it
    around each step, ``with run:``; it ends when it is dropped, or with ``run.close()``. Sessions
    nest; tasks inherit them, threads do not. Memories are given back after the last planned call.

    Raises:
        ValueError: ``num_steps`` is not a positive integer or is not the number of ``timesteps``,
            or the timesteps are not finite numbers.
    """
    number = number_of_steps(num_steps, "session")
    listed = None if timesteps is None else _listed(timesteps)
    if listed is not None and number not in (None, len(listed)):
        raise ValueError(
            f"session(num_steps={num_steps}, timesteps=...): {len(listed)} timesteps were given, "
            "one is needed for each step"
        )
    return Handle(Session(number if listed is None else len(listed), listed))


def _listed(timesteps: Any) -> Schedule:
    """The timesteps as plain data; a tensor on a device is read here, once."""
    wanted = "expected numbers, the model's timestep at each call"
    try:
        # Numbers keep all of their digits: they are compared with the model's, in its precision.
        known = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"session(timesteps={_short(timesteps)}): {wanted}") from error
    if known.dim() == 0 or known.dim() > 2 or not known.numel():
        raise ValueError(
            f"session(timesteps={_short(timesteps)}): {wanted}, as [T], or as [T, rows] where rows "
            "have their own"
        )
    if len(known) > MOST_STEPS:
        raise ValueError(
            f"session(timesteps={_short(timesteps)}): {len(known)} model calls, and {MOST_STEPS} "
            "are the most"
        )
    rows = known.reshape(len(known), -1).tolist()
    for at, row in enumerate(rows):
        if not all(map(math.isfinite, row)):
            raise ValueError(
                f"session(timesteps=...): number {at} is {row[0] if len(row) == 1 else row}; "
                f"{wanted}"
            )
    return tuple(map(one_or_all, rows))


def _short(value: object) -> str:
    said = " ".join(repr(value).split())
    return said if len(said) <= 60 else said[:57] + "..."


@contextmanager
def branch(name: str) -> Iterator[None]:
    """The guidance branch that the calls inside belong to, such as "cond" or "uncond".

    Branches that are called one after the other have memories and a clock each. Branches nest:
    guidance inside of tiles, or of windows of a long video.

    Raises:
        ValueError: ``name`` is not a non-empty string.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f'branch({name!r}): expected a non-empty name, such as "uncond"')
    with told_branch(name, None, sys._getframe(2)):
        yield


@contextmanager
def told_branch(name: str, told: Told | None, caller: FrameType | None) -> Iterator[None]:
    """As ``branch``, with what was told of the calls inside; the frame ``caller`` enters it."""
    own = caller is not None and caller.f_code.co_flags & _GENERATORS and not _for_others(caller)
    entered = _Branch(name, told, id(caller) if own else None)
    _branches.set((*_branches.get(), entered))
    try:
        yield
    finally:
        _branches.set(tuple(each for each in _branches.get() if each is not entered))


def current_branch() -> tuple[tuple[str, ...], Told | None]:
    """The names of the branch of a call, and what was told with them."""
    entered = _branches.get()
    if any(each.frame is not None for each in entered):
        running, frame = set(), sys._getframe(1)
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back  # type: ignore[assignment]
        entered = tuple(each for each in entered if each.frame is None or each.frame in running)
    told = [each.told for each in entered if each.told is not None]
    return tuple(each.name for each in entered), told[-1] if told else None
