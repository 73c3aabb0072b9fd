"""Whose step it is: the sessions and branches that a call is made in."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Collection, Iterator, Sequence
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
    """A session, or a branch by its ``name``, that was entered by the frame of that number.

    ``told`` is what came with it. What a generator has entered is for its own calls, but for
    a session in which it makes none: that stands for the calls of whoever waits for it.
    """

    frame: int
    generator: bool
    session: Session | None = None
    name: str = ""
    told: Told | None = None
    left: bool = False
    stepwise: bool = False


# From the outside in.
_entered: ContextVar[tuple[_Entry, ...]] = ContextVar("toca_fx_entered", default=())
# A generator's frame is found wherever it goes on, also in another thread or context.
_generators: dict[int, list[_Entry]] = {}
_implicit = Session(implicit=True)


@dataclass(frozen=True)
class Place:
    """Where a call is made: in a ``session``, and in branches, ``path``, from the outside in.

    ``told`` is what came with them, the innermost word.
    """

    session: Session
    path: tuple[str, ...] = ()
    told: Told | None = None


def current_place() -> Place:
    """The innermost session that was entered and not left, and the branches; of this call.

    Calls in no session have one for all of them.
    """
    entered = [entry for entry in _entered.get() if not entry.left]
    if not entered and not _generators:
        return Place(_implicit)
    innermost, running = _on_stack({entry.frame for entry in entered if _is_plain(entry)})
    if innermost is not None:
        innermost.stepwise = True
    sessions = [entry for entry in entered if entry.session is not None and not entry.stepwise]
    entry = innermost or (sessions[-1] if sessions else None)
    plain = (entry for entry in entered if not entry.generator)
    around = [*reversed(running), *plain]
    told = [entry.told for entry in around if entry.told is not None]
    session = entry.session if entry is not None and entry.session is not None else _implicit
    path = tuple(entry.name for entry in around if entry.name)
    return Place(session, path, told[-1] if told else None)


def current_session() -> Session:
    """The session that a call is made in (see ``current_place``)."""
    return current_place().session


def _is_plain(entry: _Entry) -> bool:
    return entry.session is not None and not entry.generator


def _on_stack(plain: Collection[int]) -> tuple[_Entry | None, list[_Entry]]:
    """What the generators that run now have entered, from the inside out.

    And the innermost session among it, unless a frame in ``plain`` entered one further in.
    """
    innermost: _Entry | None = None
    running: list[_Entry] = []
    decided = False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        own = [entry for entry in reversed(_generators.get(id(frame), ())) if not entry.left]
        running += own
        if not decided:
            opened = (entry for entry in own if entry.session and not entry.session.closed)
            innermost = next(opened, None)
            decided = innermost is not None or id(frame) in plain
        frame = frame.f_back
    return innermost, running


def _enter(caller: FrameType | None, **what: Any) -> _Entry:
    """Enter a session or branch; ``caller`` is the frame that does so, if it may be a generator."""
    flags = 0 if caller is None else caller.f_code.co_flags
    is_generator = caller is not None and bool(flags & _GENERATORS) and not _for_others(caller)
    entry = _Entry(id(caller), is_generator, **what)
    if is_generator:
        _generators.setdefault(entry.frame, []).append(entry)
    _entered.set((*(each for each in _entered.get() if not each.left), entry))
    return entry


def _for_others(generator: FrameType) -> bool:
    """Whether a generator runs for the body of a ``with`` statement, or is a fixture of pytest."""
    waits = generator.f_back
    file = "" if waits is None else waits.f_code.co_filename
    return file == contextlib.__file__ or ("_pytest" in file and file.endswith("fixtures.py"))


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
        self._entries.append(_enter(sys._getframe(1), session=self.session))
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
        self._entries.append(_enter(sys._getframe(1), session=self.session))
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
    with told_branch(name, caller=sys._getframe(2)):
        yield


@contextmanager
def told_branch(
    name: str, told: Told | None = None, caller: FrameType | None = None
) -> Iterator[None]:
    """As ``branch``, with what was ``told`` of the calls inside.

    If ``caller``, which enters it, is a generator, it is for that generator's own calls.
    """
    entry = _enter(caller, name=name, told=told)
    try:
        yield
    finally:
        _leave(entry)


@contextmanager
def told_session(session: Session, told: Told | None) -> Iterator[None]:
    """The calls inside are of ``session``, at the place that is ``told``, if it is."""
    entry = _enter(None, session=session, told=told)
    try:
        yield
    finally:
        _leave(entry)
