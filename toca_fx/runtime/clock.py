"""The clock of a session: which step of which generation a call is.

``decide`` is pure: it makes a ``Decision`` of a ``Situation``, and touches neither tensors nor
logs. Sessions carry it out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """How far a generation has come: ``position`` of its ``num_steps`` model calls are done.

    ``timestep`` is the last one that was read (None: none was), ``direction`` the first difference
    between two of them (0.0: not known yet). ``ambiguous`` says that its calls may belong to
    several branches or generations, ``caches_lost`` that its caches hold nothing a step may read:
    none was run yet, or the last one failed.
    """

    num_steps: int
    position: int = 0
    timestep: float | None = None
    direction: float = 0.0
    ambiguous: bool = False
    caches_lost: bool = True

    @property
    def finished(self) -> bool:
        """Whether every planned step has run."""
        return self.position >= self.num_steps

    def turns_back(self, timestep: float | None) -> bool:
        """Whether ``timestep`` (None: not read) goes against the direction of the run so far.

        That is the sign of a new generation.
        """
        if timestep is None or self.timestep is None:
            return False
        return (timestep - self.timestep) * self.direction < 0

    def advance(self, timestep: float | None) -> Progress:
        """The progress after a step at ``timestep`` (None: not read) that wrote its caches."""
        done = replace(self, position=self.position + 1, caches_lost=False)
        if timestep is None:
            return done
        direction = self.direction
        if self.timestep is not None and not direction:
            direction = timestep - self.timestep
        return replace(done, timestep=timestep, direction=direction)


@dataclass(frozen=True)
class Situation:
    """What is known of a model call before it is run.

    ``implicit`` says that it happens outside of any ``toca_fx.session``, ``has_timestep`` that an
    argument of the model is recognised as the timestep. ``timestep`` is its value, None if it is
    not read. ``current`` is the progress of the model's and branch's last generation, if there is
    one, and ``program_changed`` says that it ran with inputs of other shapes, dtypes or devices.
    """

    implicit: bool
    has_timestep: bool = True
    timestep: float | None = None
    current: Progress | None = None
    program_changed: bool = False


@dataclass(frozen=True)
class Decision:
    """What a model call is: step ``position`` of a generation, which ``begins`` with it or goes on.

    ``ambiguous`` is that of the generation from here on, ``full`` says that the step has to be full
    whatever the plan says, and ``warnings`` are what the user has to know, in order.
    """

    begins: bool
    position: int
    ambiguous: bool = False
    full: bool = True
    warnings: tuple[str, ...] = ()


def decide(situation: Situation) -> Decision:
    """Whether a call goes on with the current generation or begins one, and as which step.

    A call outside of any session begins a generation after the last planned step, when the timestep
    turns back, or with other shapes. The clock of a session goes on through all of that.
    """
    warnings = []
    if situation.implicit and not situation.has_timestep:
        warnings.append(_NO_TIMESTEP)
    current = situation.current
    if current is None:
        return Decision(begins=True, position=0, warnings=tuple(warnings))
    if situation.program_changed:  # nothing of the old caches fits
        if situation.implicit:
            return Decision(begins=True, position=0, warnings=tuple(warnings))
        warnings.append(_OTHER_INPUTS)
        return Decision(begins=True, position=current.position, warnings=tuple(warnings))
    if situation.implicit and (current.finished or current.turns_back(situation.timestep)):
        warnings += _other_length(current, situation.timestep)
        return Decision(begins=True, position=0, warnings=tuple(warnings))
    return _go_on(situation, current, warnings)


def _go_on(situation: Situation, current: Progress, warnings: list[str]) -> Decision:
    """The next step of the ``current`` generation.

    It is full on lost caches, past the last step, and where branches may be mixed.
    """
    ambiguous = current.ambiguous
    if current.finished:
        warnings.append(
            f"the model was called more often than the session's {current.num_steps} steps; the "
            "calls beyond are full steps. Give session(num_steps=...) the number of model calls"
        )
    if situation.timestep is not None and situation.timestep == current.timestep:
        # Guidance branches, or generations of one call each. A session's clock is the caller's
        # word; outside of one there is none.
        ambiguous = situation.implicit
        warnings.append(same_timestep(caches=not situation.implicit))
    full = current.caches_lost or current.finished or ambiguous
    return Decision(False, current.position, ambiguous, full, tuple(warnings))


def _other_length(current: Progress, timestep: float | None) -> list[str]:
    """The warning of a generation outside of any session that is over, none if it was as planned.

    It may have been longer or shorter.
    """
    turned = current.turns_back(timestep)
    if timestep is None or not current.direction or current.finished == turned:
        return []
    if current.finished:
        return [
            f"the policy has {current.num_steps} steps, and a generation went on after them; the "
            "next one began in the middle of it"
        ]
    return [
        f"a generation ended after {current.position} steps; the policy has {current.num_steps}, "
        "of which it had the first ones only. Put each generation into a "
        "toca_fx.session(num_steps=...)"
    ]


def same_timestep(caches: bool) -> str:
    """The warning of two calls at one timestep; ``caches`` says whether they are cached even so."""
    consequence = "they share caches and clock" if caches else "nothing is cached from here on"
    return (
        f"two calls in a row had the same timestep, and {consequence}; if they are guidance "
        "branches, set `guidance: {layout: separate}` in the policy, or wrap each kind of call in "
        "toca_fx.branch(name)"
    )


def stretched(policy: str, tuned_for: int, num_steps: int) -> str | None:
    """The warning that a ``policy`` runs another number of steps than it was ``tuned_for``.

    None if it does not.
    """
    if num_steps == tuned_for:
        return None
    return (
        f"policy `{policy}` was tuned for {tuned_for} steps and runs {num_steps}: its slopes and "
        "windows are stretched over them"
    )


def ended_early(progress: Progress) -> str | None:
    """The warning that a session ended before its last step; None if it did not."""
    if progress.finished:
        return None
    return (
        f"the session was planned for {progress.num_steps} steps and had {progress.position}, so "
        "that the policy's last steps were left out. Give session(num_steps=...) the number of "
        "model calls, or session(timesteps=...) those of the scheduler after its set_timesteps"
    )


_NO_TIMESTEP = (
    "no argument of the model is recognised as the timestep, so that a new generation is not "
    "noticed before the policy's steps have run; put each generation into a toca_fx.session()"
)
_OTHER_INPUTS = (
    "the inputs changed their shape, dtype or gradient mode in the middle of a generation, and the "
    "caches were dropped; if two kinds of calls alternate, wrap one of them in "
    "toca_fx.branch(name)"
)
