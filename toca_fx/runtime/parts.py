"""Calls of a model, whose graph may be broken: all parts of a call are one step.

If one of them fails the call was not made. What fails in the user's own code between them is not
seen here.

The first part that runs decides. Those that follow run in frames that the first one's frame has
called: what Dynamo makes of the code behind a graph break is a function, and a module that it did
not look into runs in a frame of its own.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch

from toca_fx.runtime import words

if TYPE_CHECKING:
    from toca_fx.runtime.clock import Progress
    from toca_fx.runtime.generation import Generation
    from toca_fx.runtime.generations import Generations
    from toca_fx.runtime.schedules import Timestep
    from toca_fx.runtime.session import Session

_TORCH = torch.__path__[0]


@dataclass(frozen=True)
class Call:
    """Where a graph, the ``part`` of a model, was called: by the frame of that number.

    Numbers are given again: ``code`` is what that frame runs. Nothing is kept alive: Dynamo lets go
    of what it compiled when its code goes.
    """

    part: weakref.ref[Any]
    frame: int
    code: weakref.ref[CodeType]


def _nothing() -> None:
    """A reference to nothing."""


@dataclass
class Attempt:
    """A call of a model, as far as it has come: a step of ``generation``, in ``session``.

    ``call`` is where its first part was called (None: there is but one), ``within`` the call of the
    model that it belongs to, if that is known. ``known`` is what is known
    of the model, which may have ``begun`` before; ``before`` is the progress of the generation
    ahead of the call (None: it has not come to that). ``visits`` counts how often each other part
    has come since, by its identity: layers may share their code. That there are several was
    ``expected``, and has been said.
    """

    call: Call | None = None
    session: Callable[[], Session | None] = _nothing
    known: Callable[[], Generations | None] = _nothing
    generation: Callable[[], Generation | None] = _nothing
    timestep: Timestep | None = None
    begun: bool = False
    before: Progress | None = None
    visits: Counter[Hashable] = field(default_factory=Counter)
    expected: bool = False
    within: object = None

    def begin(
        self,
        session: Session,
        known: Generations,
        generation: Generation,
        timestep: Timestep | None,
    ) -> None:
        """Note whose step it is."""
        self.session, self.known = weakref.ref(session), weakref.ref(known)
        self.generation, self.timestep = weakref.ref(generation), timestep
        self.begun = known.begun
        self.before = generation.progress

    def undo(self) -> None:
        """The call failed, wherever that was: it was not made, and memories hold nothing."""
        generation, known, before = self.generation(), self.known(), self.before
        if generation is None or known is None or before is None:
            return
        generation.progress = replace(before, lost=True)
        known.begun = self.begun
        if not before.calls:
            known.drop(generation)


class _Last(threading.local):
    attempt: Attempt | None = None


_last = _Last()


def behind(warn: Callable[[str | None], None]) -> Callable[[str | None], None]:
    """``warn`` for parts behind the first: what they are given are no captions of the user's."""
    return lambda message: None if message == words.REBUILT else warn(message)


def attempt_of(
    part: object, depth: int, *, expected: bool = False, within: object = None
) -> Attempt:
    """The call of ``part``, whose frame is ``depth`` up: a new one if ``part`` is the first.

    That is told by the call of the model that it runs ``within``; None: by frames.
    """
    frame = sys._getframe(depth + 1)
    while frame.f_code.co_filename.startswith(_TORCH) and frame.f_back is not None:
        frame = frame.f_back
    last = _last.attempt
    if (
        last is not None
        and last.session() is not None
        and (last.within is within if within else _follows(part, frame, last.call))
    ):
        return last
    call = Call(weakref.ref(part), id(frame), weakref.ref(frame.f_code))
    return Attempt(call, expected=expected, within=within)


def _follows(part: object, frame: FrameType, lead: Call | None) -> bool:
    """Whether ``part`` runs in a frame that the frame of ``lead``, another part, has called."""
    if lead is None or lead.part() is part or lead.frame == id(frame):
        return False
    caller = frame.f_back
    while caller is not None:
        if id(caller) == lead.frame and caller.f_code is lead.code():
            return True
        caller = caller.f_back
    return False


def leads(attempt: Attempt) -> None:
    """Let the parts that are called from here on follow the first part of a call."""
    if attempt.call is not None:
        _last.attempt = attempt
