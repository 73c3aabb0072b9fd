"""Models that Dynamo captured in several graphs: all parts of a call are one step.

The first part that runs decides. Those that follow run in frames that the first one's frame has
called: what Dynamo makes of the code behind a graph break is a function, and a module that it did
not look into runs in a frame of its own.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from toca_fx.runtime.generation import Generation
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


@dataclass(frozen=True)
class Lead:
    """What the first part of a call has done: a step of ``generation``, in ``session``.

    ``said`` is what the user was told of the image. ``visits`` counts how often each other part has
    come since: layers may share their code.
    """

    call: Call
    session: weakref.ref[Session]
    generation: weakref.ref[Generation]
    timestep: Timestep | None
    said: set[str]
    visits: Counter[Hashable] = field(default_factory=Counter)


class _Last(threading.local):
    lead: Lead | None = None


_last = _Last()


def call_of(part: object, depth: int) -> tuple[Call, Lead | None]:
    """The call of ``part``, whose frame is ``depth`` up, and what the first part of it has done.

    That is None if ``part`` is the first.
    """
    frame = sys._getframe(depth + 1)
    while frame.f_code.co_filename.startswith(_TORCH) and frame.f_back is not None:
        frame = frame.f_back
    call = Call(weakref.ref(part), id(frame), weakref.ref(frame.f_code))
    lead = _last.lead
    if lead is None or lead.call.part() is part or lead.call.frame == call.frame:
        return call, None
    caller: FrameType | None = frame.f_back
    while caller is not None:
        if id(caller) == lead.call.frame and caller.f_code is lead.call.code():
            return call, lead
        caller = caller.f_back
    return call, None


def leads(
    call: Call,
    session: Session,
    generation: Generation,
    timestep: Timestep | None,
    said: set[str],
) -> None:
    """Note what the first part of a call has done (see ``Lead``)."""
    _last.lead = Lead(call, weakref.ref(session), weakref.ref(generation), timestep, said)
