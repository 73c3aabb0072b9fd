"""The clock: which step of which generation a call is, as a table of situations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from toca_fx.runtime.clock import Progress, Situation, decide, ended_early, stretched

# Three of ten steps are done, from timestep 900 down to 700.
RUNNING = {
    "num_steps": 10,
    "position": 3,
    "timestep": 700.0,
    "direction": -100.0,
    "caches_lost": False,
}
NO_TIMESTEP = "no argument of the model is recognised as the timestep"
OTHER_INPUTS = "the inputs changed their shape"
TWO_CALLS = "two calls in a row had the same timestep"


@dataclass(frozen=True)
class Case:
    """A call, and what the clock has to say of it. ``current`` is what differs from ``RUNNING``;
    None: no generation has begun.
    """

    name: str
    call: dict[str, Any]
    current: dict[str, Any] | None
    begins: bool
    position: int
    full: bool
    warnings: tuple[str, ...] = ()
    ambiguous: bool = False


SESSION, NONE = {"implicit": False}, {"implicit": True}  # inside of a session, and outside of any

CASES = [
    # The first call.
    Case("first in a session", SESSION | {"timestep": 900.0}, None, True, 0, True),
    Case("first outside", NONE | {"timestep": 900.0}, None, True, 0, True),
    Case("session, no timestep", SESSION | {"has_timestep": False}, None, True, 0, True),
    Case(
        "outside, no timestep",
        NONE | {"has_timestep": False},
        None,
        True,
        0,
        True,
        (NO_TIMESTEP,),
    ),
    # The next step of a run.
    Case("session goes on", SESSION | {"timestep": 600.0}, {}, False, 3, False),
    Case("outside goes on", NONE | {"timestep": 600.0}, {}, False, 3, False),
    Case("timestep not read", SESSION, {}, False, 3, False),
    Case("only one read so far", NONE | {"timestep": 950.0}, {"direction": 0.0}, False, 3, False),
    Case("none read so far", NONE | {"timestep": 9.0}, {"timestep": None}, False, 3, False),
    Case(
        "outside goes on, no timestep",
        NONE | {"has_timestep": False},
        {"timestep": None, "direction": 0.0},
        False,
        3,
        False,
        (NO_TIMESTEP,),
    ),
    Case("after a failure", SESSION | {"timestep": 600.0}, {"caches_lost": True}, False, 3, True),
    # The timestep turns back.
    Case("session, turned", SESSION | {"timestep": 900.0}, {}, False, 3, False),
    Case(
        "outside, turned too early",
        NONE | {"timestep": 900.0},
        {},
        True,
        0,
        True,
        ("a generation ended after 3 steps; the policy has 10, of which it had the first ones",),
    ),
    Case(
        "outside, turned, upwards",
        NONE | {"timestep": 1.0},
        {"direction": 100.0},
        True,
        0,
        True,
        ("a generation ended after 3 steps",),
    ),
    # The planned steps have run.
    Case("outside, over", NONE | {"timestep": 900.0}, {"position": 10}, True, 0, True),
    Case(
        "outside, over, timestep not read",
        NONE,
        {"position": 10, "timestep": None, "direction": 0.0},
        True,
        0,
        True,
    ),
    Case(
        "outside, goes on after the last step",
        NONE | {"timestep": 600.0},
        {"position": 10},
        True,
        0,
        True,
        ("the policy has 10 steps, and a generation went on after them",),
    ),
    Case(
        "outside, one step a generation",
        NONE | {"timestep": 700.0},
        {"num_steps": 1, "position": 1, "direction": 0.0},
        True,
        0,
        True,
    ),
    Case(
        "session, beyond",
        SESSION | {"timestep": 600.0},
        {"position": 10},
        False,
        10,
        True,
        ("more often than the session's 10 steps; the calls beyond are full steps",),
    ),
    # Two calls at one timestep.
    Case(
        "session, same timestep",
        SESSION | {"timestep": 700.0},
        {},
        False,
        3,
        False,
        (f"{TWO_CALLS}, and they share caches and clock",),
    ),
    Case(
        "outside, same timestep",
        NONE | {"timestep": 700.0},
        {},
        False,
        3,
        True,
        (f"{TWO_CALLS}, and nothing is cached from here on",),
        ambiguous=True,
    ),
    Case(
        "outside, after two at one",
        NONE | {"timestep": 600.0},
        {"ambiguous": True},
        False,
        3,
        True,
        ambiguous=True,
    ),
    Case(
        "outside, a new run after two at one",
        NONE | {"timestep": 900.0},
        {"ambiguous": True, "position": 10},
        True,
        0,
        True,
    ),
    Case(
        "session, beyond and same timestep",
        SESSION | {"timestep": 700.0},
        {"position": 10},
        False,
        10,
        True,
        ("more often than the session's", TWO_CALLS),
    ),
    # Other shapes, dtypes or devices.
    Case(
        "session, other inputs",
        SESSION | {"timestep": 600.0, "program_changed": True},
        {},
        True,
        3,
        True,
        (OTHER_INPUTS,),
    ),
    Case(
        "session, other inputs at the same timestep",
        SESSION | {"timestep": 700.0, "program_changed": True},
        {},
        True,
        3,
        True,
        (OTHER_INPUTS,),
    ),
    Case(
        "outside, other inputs",
        NONE | {"timestep": 600.0, "program_changed": True},
        {},
        True,
        0,
        True,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_clock_decides(case: Case) -> None:
    current = None if case.current is None else Progress(**{**RUNNING, **case.current})
    decision = decide(Situation(**case.call, current=current))
    assert (decision.begins, decision.position) == (case.begins, case.position)
    assert (decision.full, decision.ambiguous) == (case.full, case.ambiguous)
    assert len(decision.warnings) == len(case.warnings)
    for warning, words in zip(decision.warnings, case.warnings, strict=True):
        assert words in warning


def test_the_direction_is_that_of_the_first_two_timesteps() -> None:
    progress = Progress(5)
    assert progress.caches_lost
    assert not progress.turns_back(1.0)
    for timestep, direction in ((9.0, 0.0), (9.0, 0.0), (7.0, -2.0), (8.0, -2.0)):
        progress = progress.advance(timestep)
        assert (progress.timestep, progress.direction) == (timestep, direction)
        assert not progress.caches_lost
    assert not progress.finished
    assert progress.turns_back(9.0)
    assert not progress.turns_back(None)
    last = progress.advance(None)
    assert (last.timestep, last.direction) == (8.0, -2.0), "one that was not read changes nothing"
    assert last.finished


def test_another_number_of_steps_is_warned_of() -> None:
    assert stretched("dit", 50, 50) is None
    assert stretched("dit", 50, 20) == (
        "policy `dit` was tuned for 50 steps and runs 20: its slopes and windows are stretched "
        "over them"
    )


def test_a_session_that_ends_early_says_so() -> None:
    assert ended_early(Progress(10, 10)) is None
    warning = ended_early(Progress(10, 4))
    assert warning is not None
    assert "planned for 10 steps and had 4" in warning
