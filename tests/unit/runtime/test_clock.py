"""The clock: which step of which generation a call is, as a table of situations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from toca_fx.runtime.clock import Decision, Progress, Situation, Told, decide
from toca_fx.runtime.schedules import Schedule
from toca_fx.runtime.start import both, start


def at(*timesteps: float) -> Schedule:
    return tuple((timestep,) for timestep in timesteps)


# Three of ten steps are done, from timestep 900 down to 700.
RUNNING = Progress(10, 3, (700.0,), -1, at(900.0, 800.0, 700.0), calls=1, lost=False)
TEN = at(*range(900, -100, -100))
HEUN = at(900.0, 800.0, 800.0, 700.0, 700.0, 600.0, 600.0)

SESSION, LISTED, NONE = Told(10), Told(10, TEN), None

TWO_CALLS = "two calls in a row had the same timestep"
UNSEEN = "nobody told the steps of the run that began at timestep"


@dataclass(frozen=True)
class Case:
    """A call at timestep ``t`` (None: not read), what is ``told``, and what the clock says of it.

    ``current`` is what of the generation with the same conditions differs from ``RUNNING``; None:
    there is none. ``head`` is the same of the generation called last; None: it is the current one.
    """

    name: str
    told: Told | None
    t: float | tuple[float, ...] | None
    current: dict[str, Any] | None
    place: str
    position: int
    full: bool
    warnings: tuple[str, ...] = ()
    head: dict[str, Any] | None = None
    more: Any = None
    again: bool = False
    num_steps: int | None = 10


SECOND = {"num_steps": 7, "position": 2, "timestep": (800.0,), "trail": HEUN[:2]}
OLD, NEW = {}, None  # known conditions, and others
CASES = [
    # In a session: the first call, and the next ones.
    Case("first", SESSION, 900.0, NEW, "generation", 0, True),
    Case("first, not read", SESSION, None, NEW, "generation", 0, True),
    Case("next", SESSION, 600.0, OLD, "on", 3, False),
    Case("next, not read", SESSION, None, OLD, "on", 3, False),
    Case("next, no timestep", SESSION, None, OLD, "on", 3, False, more={"has_timestep": False}),
    Case("next, listed", LISTED, 600.0, OLD, "on", 3, False),
    Case(
        "next, listed but for rounding", LISTED, 600.5, OLD, "on", 3, False, more={"rounding": 1e-3}
    ),
    Case(
        "listed neighbours that the dtype does not tell apart",
        Told(10, at(900.0, 800.0, 700.0, 699.0)),
        700.0,
        OLD,
        "on",
        3,
        True,
        more={"rounding": 2**-8},
        again=True,
    ),
    Case("after a failure", SESSION, 600.0, {"lost": True}, "on", 3, True),
    Case(
        "the first one failed",
        SESSION,
        900.0,
        {"calls": 0, "position": 0, "timestep": None},
        "on",
        0,
        True,
    ),
    Case(
        "beyond",
        SESSION,
        -100.0,
        {"position": 10},
        "on",
        10,
        True,
        ("more often than the 10",),
    ),
    Case("beyond, not read", SESSION, None, {"position": 10}, "on", 10, True, ("more often",)),
    # Guidance by two calls a step: other conditions at the timestep of the call before.
    Case(
        "a branch begins",
        SESSION,
        900.0,
        NEW,
        "branch",
        0,
        True,
        head={"position": 1, "timestep": (900.0,)},
    ),
    Case("a branch begins later", SESSION, 700.0, NEW, "branch", 2, True, head={}),
    Case("a branch begins later, and comes first", SESSION, 600.0, NEW, "branch", 3, True, head={}),
    Case("a branch begins, listed", LISTED, 700.0, NEW, "branch", 2, True, head={}),
    Case("a branch begins and comes first, listed", LISTED, 600.0, NEW, "branch", 3, True, head={}),
    Case(
        "a branch begins, not read",
        SESSION,
        None,
        NEW,
        "branch",
        2,
        True,
        head={},
        more={"several": True},
    ),
    Case("captions change, not read", SESSION, None, NEW, "branch", 3, True, head={}),
    Case(
        "the second branch's next",
        SESSION,
        600.0,
        OLD,
        "on",
        3,
        False,
        head={"position": 4, "timestep": (600.0,)},
    ),
    Case("the first branch's next", SESSION, 600.0, OLD, "on", 3, False, head={}),
    Case(
        "after a pause, second",
        SESSION,
        400.0,
        OLD,
        "on",
        5,
        True,
        head={"position": 6, "timestep": (400.0,)},
    ),
    Case(
        "after a pause, first",
        SESSION,
        400.0,
        OLD,
        "on",
        5,
        True,
        head={"position": 5, "timestep": (500.0,)},
    ),
    Case("after a pause, not read", SESSION, None, OLD, "on", 5, True, head={"position": 6}),
    Case("second, not read", SESSION, None, {"second": True}, "on", 3, False, head={"position": 4}),
    Case("second, and first before", SESSION, None, OLD, "on", 3, True, head={"position": 4}),
    Case(
        "first again, listed twice",
        Told(7, HEUN),
        800.0,
        {"num_steps": 7, "position": 1, "timestep": (900.0,), "trail": HEUN[:1]},
        "on",
        1,
        True,
        head={"position": 2, "timestep": (800.0,)},
        num_steps=7,
    ),
    Case(
        "after a pause, listed twice",
        Told(7, HEUN),
        800.0,
        {"num_steps": 7, "position": 1, "timestep": (900.0,), "trail": HEUN[:1], "second": True},
        "on",
        2,
        True,
        head={"position": 3, "timestep": (800.0,)},
        num_steps=7,
    ),
    Case("after a pause, listed", LISTED, 400.0, OLD, "on", 5, True),
    # Two calls of one step that nothing tells apart; a second-order sampler.
    Case("the same timestep", SESSION, 700.0, OLD, "on", 2, True, (TWO_CALLS,), again=True),
    Case("after two at one", SESSION, 600.0, {"calls": 2}, "on", 3, True),
    Case(
        "the second call, listed twice", Told(7, HEUN), 800.0, SECOND, "on", 2, False, num_steps=7
    ),
    Case(
        "listed twice, and may be of the same step",
        Told(7, HEUN),
        800.0,
        SECOND,
        "on",
        1,
        True,
        ("lists twice",),
        more={"repeats": True},
        again=True,
        num_steps=7,
    ),
    Case(
        "listed twice, after two calls of a step",
        Told(7, HEUN),
        800.0,
        {**SECOND, "doubled": True},
        "on",
        1,
        True,
        ("lists twice",),
        again=True,
        num_steps=7,
    ),
    Case(
        "the same timestep, listed",
        LISTED,
        700.0,
        OLD,
        "on",
        2,
        True,
        ("lists it once",),
        again=True,
    ),
    Case(
        "Heun, listed",
        Told(7, HEUN),
        800.0,
        {"num_steps": 7, "position": 2, "timestep": (800.0,)},
        "on",
        2,
        False,
        num_steps=7,
    ),
    Case(
        "another branch of Heun",
        Told(7, HEUN),
        800.0,
        NEW,
        "branch",
        1,
        True,
        head={"num_steps": 7, "position": 2},
        num_steps=7,
    ),
    # Another image in the same session.
    Case("turned back", SESSION, 900.0, OLD, "generation", 0, True),
    Case(
        "turned back, seen with another length",
        SESSION,
        900.0,
        OLD,
        "generation",
        0,
        True,
        more={"seen": (TEN[:5],)},
        num_steps=5,
    ),
    Case("turned back at the end", SESSION, 900.0, {"position": 10}, "generation", 0, True),
    Case(
        "turned back, upwards", SESSION, 1.0, {"direction": 1}, "generation", 0, True, num_steps=10
    ),
    Case(
        "turned back, other conditions",
        SESSION,
        900.0,
        NEW,
        "generation",
        0,
        True,
        head={},
        num_steps=10,
    ),
    Case("turned back, listed", LISTED, 900.0, OLD, "generation", 0, True),
    Case(
        "turned back, listed, other conditions", LISTED, 900.0, NEW, "generation", 0, True, head={}
    ),
    Case("turned back to the middle, listed", LISTED, 800.0, OLD, "generation", 1, True),
    Case("not listed", LISTED, 650.0, OLD, "on", 3, True, ("not listed",)),
    Case(
        "not listed, other conditions",
        LISTED,
        650.0,
        NEW,
        "branch",
        3,
        True,
        ("not listed",),
        head={},
    ),
    Case(
        "a row turned back",
        SESSION,
        (600.0, 900.0),
        {"timestep": (700.0, 700.0)},
        "on",
        3,
        True,
        ("some rows",),
    ),
    Case(
        "all rows turned back",
        SESSION,
        (900.0, 950.0),
        {"timestep": (700.0, 700.0)},
        "generation",
        0,
        True,
        num_steps=10,
    ),
    # Another thread or task has these conditions too.
    Case("apart, next", SESSION, 600.0, OLD, "on", 3, False, more={"apart": True}),
    Case(
        "apart, from the beginning",
        SESSION,
        900.0,
        OLD,
        "generation",
        0,
        True,
        more={"apart": True},
        num_steps=10,
    ),
    Case("apart, the same timestep", SESSION, 700.0, OLD, "branch", 2, True, more={"apart": True}),
    # Numbers that came with the call, in a session or not.
    Case("told its number", Told(10, None, 3), 600.0, OLD, "on", 3, False),
    Case(
        "told the same number",
        Told(10, None, 2),
        700.0,
        OLD,
        "on",
        2,
        True,
        ("same step_index",),
        again=True,
    ),
    Case("told a number that stays", Told(10, None, 2), 500.0, OLD, "on", 3, False),
    Case("told 0 at each step", Told(10, None, 0), 500.0, OLD, "on", 3, False),
    Case(
        "told its number, and another timestep is listed",
        Told(10, TEN, 3),
        123.0,
        OLD,
        "on",
        3,
        True,
        ("another timestep",),
    ),
    Case(
        "told its number, and its timestep is listed", Told(10, TEN, 3), 600.0, OLD, "on", 3, False
    ),
    Case("told a later number", Told(10, None, 5), 400.0, OLD, "on", 5, True),
    Case("told 0", Told(10, None, 0), 900.0, OLD, "generation", 0, True),
    Case("told 0, others", Told(10, None, 0), 900.0, NEW, "generation", 0, True, head={}),
    Case(
        "told the number of the other branch",
        Told(10, None, 2),
        700.0,
        NEW,
        "branch",
        2,
        True,
        head={},
    ),
    Case("told, beginning in the middle", Told(10, None, 4), 500.0, NEW, "generation", 4, True),
    # Outside of any session: nobody knows the steps.
    Case("outside, first", NONE, 900.0, NEW, "generation", 0, True, (UNSEEN,), num_steps=None),
    Case("outside, next", NONE, 600.0, OLD, "on", 3, True, (UNSEEN,), num_steps=None),
    Case(
        "outside, no timestep",
        NONE,
        None,
        NEW,
        "generation",
        0,
        True,
        ("no argument of the model",),
        more={"has_timestep": False},
        num_steps=None,
    ),
    Case(
        "outside, no conditions",
        NONE,
        600.0,
        NEW,
        "generation",
        0,
        True,
        ("no condition",),
        more={"identified": False},
        num_steps=None,
    ),
    Case(
        "outside, turned back", NONE, 900.0, OLD, "generation", 0, True, (UNSEEN,), num_steps=None
    ),
    Case(
        "outside, the same timestep",
        NONE,
        700.0,
        OLD,
        "on",
        2,
        True,
        (TWO_CALLS,),
        again=True,
        num_steps=None,
    ),
    # ... or the schedule was seen whole.
    Case("seen, first", NONE, 900.0, NEW, "generation", 0, True, more={"seen": (TEN,)}),
    Case("seen, next", NONE, 600.0, OLD, "on", 3, False, more={"seen": (TEN,)}),
    Case(
        "seen, next, other length",
        NONE,
        600.0,
        OLD,
        "on",
        3,
        True,
        more={"seen": (TEN[:5],)},
        num_steps=5,
    ),
    Case(
        "seen, not in it",
        NONE,
        650.0,
        OLD,
        "on",
        3,
        True,
        (UNSEEN,),
        more={"seen": (TEN,)},
        num_steps=None,
    ),
    Case(
        "seen, after its end",
        NONE,
        -100.0,
        {"position": 10, "trail": TEN},
        "on",
        10,
        True,
        (UNSEEN,),
        more={"seen": (TEN,)},
        num_steps=None,
    ),
    Case(
        "seen, after a failure", NONE, 600.0, {"lost": True}, "on", 3, True, more={"seen": (TEN,)}
    ),
    Case("seen, turned back", NONE, 900.0, OLD, "generation", 0, True, more={"seen": (TEN,)}),
    Case(
        "seen, img2img",
        NONE,
        700.0,
        NEW,
        "generation",
        0,
        True,
        (UNSEEN,),
        more={"seen": (TEN,)},
        num_steps=None,
    ),
    Case(
        "seen, the same timestep",
        NONE,
        900.0,
        {"position": 1, "timestep": (900.0,), "trail": TEN[:1]},
        "on",
        0,
        True,
        (TWO_CALLS,),
        again=True,
        more={"seen": (TEN,)},
    ),
    Case("seen, after two at one", NONE, 600.0, {"calls": 2}, "on", 3, True, more={"seen": (TEN,)}),
    Case(
        "seen, apart, next",
        NONE,
        600.0,
        OLD,
        "on",
        3,
        False,
        more={"seen": (TEN,), "apart": True},
    ),
    Case(
        "seen, apart, from the beginning",
        NONE,
        900.0,
        OLD,
        "generation",
        0,
        True,
        more={"seen": (TEN,), "apart": True},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_clock_decides(case: Case) -> None:
    current = None if case.current is None else replace(RUNNING, **case.current)
    head = current if case.head is None else replace(RUNNING, **case.head)
    timestep = (case.t,) if isinstance(case.t, float) else case.t
    found = decide(
        Situation(told=case.told, timestep=timestep, current=current, head=head, **case.more or {})
    )
    assert (found.place, found.position, found.full) == (case.place, case.position, case.full)
    assert (found.again, found.num_steps) == (case.again, case.num_steps)
    assert len(found.warnings) == len(case.warnings)
    for warning, words in zip(found.warnings, case.warnings, strict=True):
        assert words in warning


def test_every_doubtful_step_is_full() -> None:
    """Nothing is read that is lost, doubtful or of another step, whatever else is known."""
    for told in (NONE, SESSION, LISTED, Told(10, None, 3)):
        for doubt in ({"lost": True}, {"calls": 2}):
            for t in (None, *(float(each) for (each,) in TEN), 650.0):
                current = replace(RUNNING, **doubt)
                timestep = None if t is None else (t,)
                found = decide(
                    Situation(told, timestep, current=current, head=RUNNING, seen=(TEN,))
                )
                assert found.full, (told, doubt, t)


def test_progress_is_what_the_decisions_were() -> None:
    progress = Progress(5)
    for number, (timestep, direction) in enumerate(((9.0, 0), (7.0, -1), (8.0, -1))):
        progress = progress.advance(Decision("on", number, 5), (timestep,))
        assert (progress.position, progress.timestep) == (number + 1, (timestep,))
        assert (progress.direction, progress.calls, progress.lost) == (direction, 1, False)
    assert progress.trail == at(9.0, 7.0, 8.0)
    assert progress.turns_back((9.0,))
    assert not progress.turns_back(None)
    again = progress.advance(Decision("on", 3, 5, again=True), (8.0,))
    assert again.calls == 2
    assert again.advance(Decision("on", 4, 5), (7.0,)).calls == 1
    unread = progress.advance(Decision("on", 3, 5), None)
    assert (unread.timestep, unread.trail) == ((8.0,), ()), "what was not read is not known"
    assert unread.advance(Decision("on", 4, 5), (1.0,)).trail == ()
    anew = progress.advance(Decision("generation", 0, 5), (9.0,))
    assert anew.trail == at(9.0)


@pytest.mark.parametrize(
    ("run", "call", "expected"),
    [
        (None, None, None),
        (None, Told(10, None, 3), Told(10, None, 3)),
        (LISTED, None, LISTED),
        (LISTED, Told(10, None, 3), replace(LISTED, position=3)),
        (LISTED, Told(9, None, 3), LISTED),  # of another number of steps
        (Told(7, TEN[3:], skipped=3), Told(10, None, 4), Told(7, TEN[3:], 1, 3)),
        (Told(7, TEN[3:], skipped=3), Told(10, None, 2), Told(7, TEN[3:], skipped=3)),
    ],
)
def test_a_number_counts_out_of_as_many(
    run: Told | None, call: Told | None, expected: Told | None
) -> None:
    assert both(run, call) == expected


@pytest.mark.parametrize(
    ("told", "timestep", "others", "expected"),
    [
        (SESSION, 900.0, (), SESSION),
        (LISTED, 900.0, (), LISTED),
        (LISTED, 600.0, (), Told(7, TEN[3:], skipped=3)),  # image to image: a part of the schedule
        (LISTED, 600.0, (RUNNING,), Told(7, TEN[3:], skipped=3)),  # the second expert
        (LISTED, None, (RUNNING,), Told(7, TEN[3:], skipped=3)),
        (LISTED, 0.9, (), Told(10)),  # in other units
        (SESSION, 600.0, (RUNNING,), Told(7, skipped=3)),
        (SESSION, 700.0, (RUNNING,), Told(8, skipped=2)),  # beside the other one, at the same step
        (
            SESSION,
            None,
            (replace(RUNNING, position=10),),
            SESSION,
        ),  # a refiner has steps of its own
    ],
)
def test_a_model_that_comes_later_has_what_is_left(
    told: Told, timestep: float | None, others: tuple[Progress, ...], expected: Told
) -> None:
    found, warning = start(told, None if timestep is None else (timestep,), 0.0, others, 10)
    assert found == expected
    assert (warning is not None) == (timestep == 0.9)
