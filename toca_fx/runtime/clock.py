"""The clock: which step of which generation a model call is.

``decide`` is pure: it makes a ``Decision`` of a ``Situation``, and touches neither tensors nor
logs. Sessions carry it out. A call's place is told (a session, or numbers that came with the call),
or recognised by its conditions and timestep; otherwise it is in doubt, and a doubtful step is full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from toca_fx.diagnostics import MOST_STEPS
from toca_fx.runtime import words
from toca_fx.runtime.schedules import Schedule, Timestep, fits, longest


@dataclass(frozen=True)
class Progress:
    """How far a generation has come.

    ``position`` is that of its next call, out of ``num_steps``. ``timestep`` is the last one that
    was read, ``direction`` 1 or -1 once two have been (0: not yet), ``trail`` all of them since it
    began (empty if one was not read). ``calls`` is how many calls its last position had: of two
    nobody knows whose memories are left. ``doubled`` says that there were two at any position,
    ``second`` that its last call came after another branch's of the same step. ``lost`` says that
    its memories hold nothing a step may read: none was run yet, the last one failed, or they were
    given back.
    """

    num_steps: int
    position: int = 0
    timestep: Timestep | None = None
    direction: int = 0
    trail: Schedule = ()
    calls: int = 0
    doubled: bool = False
    second: bool = False
    lost: bool = True

    @property
    def finished(self) -> bool:
        """Whether every planned step has run."""
        return self.position >= self.num_steps

    def turns_back(self, timestep: Timestep | None) -> bool:
        """Whether ``timestep`` (None: not read) goes against the direction of the run so far.

        One row of a batch that does is enough.
        """
        if timestep is None or self.timestep is None or len(timestep) != len(self.timestep):
            return False
        moves = (now - before for now, before in zip(timestep, self.timestep, strict=True))
        return any(move * self.direction < 0 for move in moves)

    def advance(self, decision: Decision, timestep: Timestep | None) -> Progress:
        """The progress after the step that was decided on, which wrote the memories."""
        trail: Schedule = () if timestep is None else (timestep,)
        if decision.again:
            trail = self.trail
        elif decision.place == "on":
            begun = 0 < len(self.trail) < MOST_STEPS or not self.calls
            unbroken = timestep is not None and begun
            trail = (*self.trail, *trail) if unbroken else ()
        direction = self.direction
        if timestep is not None and self.timestep is not None and not direction:
            moved = sum(timestep) / len(timestep) - sum(self.timestep) / len(self.timestep)
            direction = (moved > 0) - (moved < 0)
        return replace(
            self,
            position=decision.position + 1,
            timestep=self.timestep if timestep is None else timestep,
            direction=direction,
            trail=trail,
            calls=self.calls + 1 if decision.again else 1,
            doubled=self.doubled or decision.again,
            second=decision.second,
            lost=False,
        )


@dataclass(frozen=True)
class Told:
    """What the caller said of a run.

    It has ``num_steps`` model calls, at ``timesteps`` if they are known; ``position`` is that of
    this very call, if it came with its number. ``skipped`` are the steps that were left out ahead.
    """

    num_steps: int
    timesteps: Schedule | None = None
    position: int | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Situation:
    """What is known of a model call before it is run.

    ``told`` is None outside of any session, and ``seen`` are the schedules that the model has run
    whole. ``timestep`` is the value of the model's argument (None: it is not read, or there is
    none), exact to ``rounding``, relatively. ``identified`` says whether any of the call's
    conditions tells generations apart. ``current`` is the generation with these conditions,
    ``apart`` if another thread, task or capture of the model ran it; ``head`` is the one called
    last, of the same run. ``several`` says that calls of several branches are expected at a step.
    ``repeats`` says that at the timestep of the call before it may be another call of that step,
    even where the timestep is listed twice: it has its very latents, or a condition made anew.
    """

    told: Told | None = None
    timestep: Timestep | None = None
    has_timestep: bool = True
    rounding: float = 0.0
    identified: bool = True
    current: Progress | None = None
    apart: bool = False
    head: Progress | None = None
    several: bool = False
    repeats: bool = False
    seen: tuple[Schedule, ...] = ()


Place = Literal["on", "branch", "generation"]


@dataclass(frozen=True)
class Decision:
    """What a model call is: step ``position``.

    It goes "on" with the current generation, or begins one: a "branch" of the run of the head, or
    the "generation" of a new run, of ``num_steps`` (None: nobody knows, and no later step reads
    what this one writes). ``full`` says that the step has to be full whatever the plan says,
    ``again`` that it is another call of the last position, ``second`` that a branch of the same run
    had its call of this step before. ``warnings`` are what the user has to know, in order.
    """

    place: Place
    position: int
    num_steps: int | None
    full: bool = True
    again: bool = False
    warnings: tuple[str, ...] = ()
    second: bool = False


def decide(situation: Situation) -> Decision:
    """Which step of which generation a call is; it is full where that is in doubt."""
    if situation.told is None:
        return _recognised(situation)
    decision, head = _told(situation, situation.told), situation.head
    if head is None or head is situation.current or decision.position != head.position - 1:
        return decision
    return replace(decision, second=True)


# Told: the run's steps are known, and conditions tell branches apart.


def _told(call: Situation, told: Told) -> Decision:
    current, head = call.current, call.head
    if current is not None and (not call.apart or _may_be_next(call, told, current)):
        return _goes_on(call, told, current)
    if head is None:
        return Decision("generation", told.position or 0, told.num_steps)
    return _begins(call, told, head)


def _may_be_next(call: Situation, told: Told, current: Progress) -> bool:
    """Whether the call is at the place that ``current`` has come to, as far as anything tells."""
    if told.position is not None:
        return told.position == current.position
    if call.timestep is None:
        return False
    if told.timesteps is not None:
        places = _places(call, told.timesteps, call.timestep)
        return current.position in places or not places
    return call.timestep != current.timestep and not current.turns_back(call.timestep)


def _goes_on(call: Situation, told: Told, current: Progress) -> Decision:
    """The next step of a generation whose conditions are known."""
    expected, t = current.position, call.timestep
    if told.position is not None and told.position < expected and _moves_on(current, t):
        told = replace(told, position=None)  # a scheduler that nobody steps stays where it is
    if told.position is not None:
        if (told.position == 0 and expected > 1) or told.num_steps != current.num_steps:
            return Decision("generation", told.position, told.num_steps)
        again = told.position == expected - 1
        decision = _on(current, told.position, again, (words.SAME_STEP,) if again else ())
        return _checked(call, told, decision)
    if t is None:
        return _on_or_ahead(call, current)
    if told.timesteps is not None:
        return _listed(call, told.timesteps, current, t)
    if t == current.timestep:  # made again, a second-order sampler, or two that share conditions
        return _on(current, expected - 1, again=True, warnings=(words.SAME_TIMESTEP,))
    if current.turns_back(t):
        return _anew(call, current, t)
    head = call.head
    if head is not None and current.position < head.position and not head.turns_back(t):
        # It missed steps; one that is slower is not where the others are.
        expected = max(expected, head.position - 1 if t == head.timestep else head.position)
    return _on(current, expected)


def _moves_on(current: Progress, timestep: Timestep | None) -> bool:
    """Whether ``timestep`` (None: not read) is one after that of the last call."""
    before = current.timestep
    return (
        None not in (timestep, before) and timestep != before and not current.turns_back(timestep)
    )


def _checked(call: Situation, told: Told, decision: Decision) -> Decision:
    """A step whose number came with the call: it is full if another timestep is listed there."""
    if told.timesteps is None or call.timestep is None:
        return decision
    if fits(told.timesteps, decision.position, call.timestep, call.rounding):
        return decision
    return replace(decision, full=True, warnings=(*decision.warnings, words.MISPLACED))


def _anew(call: Situation, current: Progress, timestep: Timestep) -> Decision:
    """A new generation, or rows of a batch that others have taken over, in the same session."""
    before = current.timestep or ()
    moves = [(now - then) * current.direction for now, then in zip(timestep, before, strict=True)]
    if not all(move < 0 for move in moves):
        return replace(_on(current, current.position, warnings=(words.ROWS,)), full=True)
    return _another(call, timestep, current.num_steps)


def _another(call: Situation, timestep: Timestep, num_steps: int) -> Decision:
    """Another generation in the session, of as many steps as one that began alike before."""
    known = longest(call.seen, (timestep,))
    return Decision("generation", 0, num_steps if known is None else len(known))


def _listed(call: Situation, listed: Schedule, current: Progress, t: Timestep) -> Decision:
    """The step of a generation whose timesteps are ``listed``."""
    expected = current.position
    if fits(listed, expected, t, call.rounding):
        same = t == current.timestep
        if same and listed[expected] != listed[expected - 1]:
            return _on(current, expected, again=True)  # the model's dtype does not tell them apart
        if same and (call.repeats or current.doubled):
            return _on(current, expected - 1, again=True, warnings=(words.LISTED_TWICE,))
        return _on_or_ahead(call, current, listed)
    if fits(listed, expected - 1, t, call.rounding):
        return _on(current, expected - 1, again=True, warnings=(words.LISTED_ONCE,))
    places = _places(call, listed, t)
    later = [at for at in places if at > expected]
    if later:  # a branch that has paused
        return _on(current, later[0])
    if places:
        return Decision("generation", places[0], current.num_steps)
    return replace(_on(current, expected, warnings=(words.UNLISTED,)), full=True)


def _on_or_ahead(call: Situation, current: Progress, listed: Schedule | None = None) -> Decision:
    """The next step, unless other branches are ahead: then ``current`` may have missed some.

    A branch that comes second is a step behind the one that came first, and no more. What did not
    come second the last time may have missed a step, unless its timestep is ``listed`` once.
    """
    head, expected = call.head, current.position
    if head is None or head is current or head.position <= expected:
        return _on(current, expected)
    latest = head.position - 1
    if latest == expected and current.second:
        return _on(current, expected)
    places = [latest]
    if listed is not None and call.timestep is not None:
        places = _places(call, listed, call.timestep)
        if len(places) == 1:
            return _on(current, expected)
    at = next((at for at in places if at >= latest), expected)
    return replace(_on(current, at), full=True)


def _places(call: Situation, listed: Schedule, timestep: Timestep) -> list[int]:
    return [at for at in range(len(listed)) if fits(listed, at, timestep, call.rounding)]


def _on(
    current: Progress, position: int, again: bool = False, warnings: tuple[str, ...] = ()
) -> Decision:
    """Step ``position`` of ``current``.

    It is full on memories that are lost, doubtful or not of the step before, and past the end.
    """
    beyond = position >= current.num_steps
    if beyond:
        warnings = (words.beyond(current.num_steps), *warnings)
    missed = position != current.position and not again
    full = current.lost or current.calls != 1 or again or missed or beyond
    return Decision("on", position, current.num_steps, full, again, warnings=warnings)


def _begins(call: Situation, told: Told, head: Progress) -> Decision:
    """The first call with these conditions: another branch, or another generation."""
    last, t = head.position - 1, call.timestep
    place: Place = "branch"
    warnings: tuple[str, ...] = ()
    if told.position is not None:
        place = "generation" if told.position == 0 and last > 0 else "branch"
        return _checked(call, told, Decision(place, told.position, told.num_steps))
    if t is None:
        position = last if call.several or not call.has_timestep else head.position
        warnings = () if call.has_timestep else (words.UNNAMED,)
    elif told.timesteps is not None:
        places = _places(call, told.timesteps, t)
        near = [at for at in places if at in (last, head.position)]
        position = (near or places or [last if t == head.timestep else head.position])[0]
        warnings = () if places else (words.UNLISTED,)
        if position < last:
            place = "generation"
    elif t == head.timestep:
        position = last
    elif head.turns_back(t):
        return _another(call, t, told.num_steps)
    else:
        position = head.position
    if position >= head.num_steps:
        warnings = (words.beyond(head.num_steps), *warnings)
    return Decision(place, max(position, 0), head.num_steps, warnings=warnings)


# Not told: recognised by conditions and timestep.


def _recognised(call: Situation) -> Decision:
    """A call outside of any session: cached if its schedule was seen whole before."""
    t, current = call.timestep, call.current
    if t is None or not call.identified:
        unknown = words.NO_CONDITIONS if call.has_timestep else words.NO_TIMESTEP
        return Decision("generation", 0, None, warnings=(unknown,))
    if current is None or (call.apart and not _follows(call, current, t)):
        return _starts(call, t)
    again = t == current.timestep
    if current.turns_back(t):
        return _starts(call, t)
    trail = current.trail if again else (*current.trail, t)
    known = longest(call.seen, trail) if trail else None
    position = max(len(trail) - 1, 0)
    warnings = (words.SAME_TIMESTEP,) if again else ()
    if known is None:
        warnings = warnings or (words.unseen(trail[0] if trail else t),)
        return Decision("on", position, None, again=again, warnings=warnings)
    trusted = not current.lost and current.calls == 1 and current.num_steps == len(known)
    return Decision("on", position, len(known), again or not trusted, again, warnings=warnings)


def _follows(call: Situation, current: Progress, timestep: Timestep) -> bool:
    return longest(call.seen, (*current.trail, timestep)) is not None


def _starts(call: Situation, timestep: Timestep) -> Decision:
    known = longest(call.seen, (timestep,))
    if known is None:
        return Decision("generation", 0, None, warnings=(words.unseen(timestep),))
    return Decision("generation", 0, len(known))
