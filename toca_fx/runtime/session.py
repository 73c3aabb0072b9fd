"""Sessions: the run that a model call belongs to, and what has been done so far.

The clock says which step of which generation a call is, the plan what the step does.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from toca_fx.diagnostics import PolicyError
from toca_fx.lower.locks import new_lock
from toca_fx.plan.plan import Plan
from toca_fx.runtime import clock, parts, words
from toca_fx.runtime.clock import Decision, Progress, Situation, Told
from toca_fx.runtime.gate import SamplingRun
from toca_fx.runtime.generation import Generation
from toca_fx.runtime.generations import Generations, owned_by_caller
from toca_fx.runtime.identity import Agreement, Mark, marks_of
from toca_fx.runtime.models import ModelKey
from toca_fx.runtime.parts import Attempt
from toca_fx.runtime.report import Recorded, Report, StepRecord, make_report
from toca_fx.runtime.runner import Runner
from toca_fx.runtime.schedules import Schedule, Timestep
from toca_fx.runtime.start import both, start
from toca_fx.runtime.timesteps import read, rounding_of
from toca_fx.runtime.units import Scheduled

log = logging.getLogger(__name__)

# Generations of a model in a session, and outside: those left in their middle keep memories.
_MOST, _MOST_UNTOLD = 256, 8


class Session:
    """One sampling run, or (implicit) all runs outside of any ``toca_fx.session``.

    ``num_steps`` are the model calls of the run (None: those of the policy), ``timesteps`` those of
    each, where they are known; ``scheduled`` says that a scheduler told them, and not the user.
    """

    def __init__(
        self,
        num_steps: int | None = None,
        timesteps: Schedule | None = None,
        *,
        implicit: bool = False,
        scheduled: Scheduled | None = None,
    ) -> None:
        self.num_steps, self._timesteps, self._scheduled = num_steps, timesteps, scheduled
        self.implicit = implicit
        self._most = _MOST_UNTOLD if implicit else _MOST
        self.closed = False
        self._models: dict[ModelKey, Generations] = {}
        # Outside of any session what is known of a model goes with it: the model has it.
        self._untold: weakref.WeakSet[ModelKey] = weakref.WeakSet()
        self._lock = new_lock()
        self._calls: list[Recorded] = []
        self._warnings: dict[str, None] = {} if scheduled is None else scheduled.warnings
        self._cache_bytes = self._hoisted_bytes = 0

    @property
    def calls(self) -> tuple[Recorded, ...]:
        """The calls so far, each with the program that ran it; none of an implicit session."""
        return tuple(self._calls)

    @property
    def generations(self) -> tuple[Generation, ...]:
        """The generations that may go on, of all models; a closed session has none."""
        return tuple(each for known in self._all for each in known.all)

    @property
    def held_bytes(self) -> tuple[int, int]:
        """The most bytes that caches and hoisted values took so far."""
        return self._cache_bytes, self._hoisted_bytes

    @property
    def _all(self) -> tuple[Generations, ...]:
        """What is known of each model."""
        untold = (model.untold for model in tuple(self._untold))
        return (*self._models.values(), *(known for known in untold if known is not None))

    def call(
        self,
        model: ModelKey,
        runner: Runner,
        inputs: Sequence[Any],
        attempt: Attempt,
        path: tuple[str, ...] = (),
        told: Told | None = None,
    ) -> Any:
        """Run the model's next step, in the branch ``path``; returns its outputs.

        If it raises, the caller undoes the ``attempt``. ``told`` is what came with the call, if
        anything did.
        """
        if self.closed:
            raise RuntimeError(words.CLOSED)
        known, generation = self._known(model, runner), None
        try:
            with known.lock:
                timestep = read(known, runner, inputs, told)
                generation, decision = self._place(known, runner, inputs, path, told, timestep)
                attempt.begin(self, known, generation, timestep)
                generation.running = True
            outputs, record = generation.run_step(decision, timestep, inputs)
            with known.lock:
                self._note(known, generation, decision, runner)
                self._record(attempt, runner, record)
                if not self.implicit and decision.place != "on":
                    self._hold()
            parts.leads(attempt)
            return outputs
        finally:
            if generation is not None:
                generation.running = False

    def follow(
        self, attempt: Attempt, model: ModelKey, runner: Runner, inputs: Sequence[Any]
    ) -> Any:
        """Run another part of the call that ``attempt`` began; returns its outputs."""
        known, whole = attempt.known(), attempt.generation()
        if known is None or whole is None:
            raise AssertionError("the first part of the call has just run")
        if not attempt.expected:
            self._say(known.said, (words.BROKEN,))
        decision, which = whole.latest, (id(model), id(runner))
        attempt.visits[which] += 1
        key = (model, runner, attempt.visits[which])
        part = whole.parts.get(key)
        if part is None:
            plan = runner.program.analysis.plan(decision.num_steps)
            begins = replace(decision, place="generation")
            warn, of = parts.behind(self.warn), (whole.path, whole.run, whole.owner)
            part = Generation(runner, plan, begins, (), *of, None, warn)
            whole.parts[key] = part
        missed = part.progress.position != decision.position
        decision = replace(decision, full=decision.full or missed)
        outputs, record = part.run_step(decision, attempt.timestep, inputs)
        self._record(attempt, runner, record)
        return outputs

    def _known(self, model: ModelKey, runner: Runner) -> Generations:
        """What is known of a model here; a session is told that it begins."""
        with self._lock:
            found = model.untold if self.implicit else self._models.get(model)
            if found is None:
                if self.implicit:
                    found = model.untold = Generations(model, None, self._most)
                    self._untold.add(model)
                else:
                    found = Generations(model, self._told(runner), self._most)
                    self._models[model] = found
            return found

    def _told(self, runner: Runner) -> Told:
        """What was said of the run."""
        return Told(self.num_steps or runner.program.analysis.settings.steps, self._timesteps)

    def _place(
        self,
        known: Generations,
        runner: Runner,
        inputs: Sequence[Any],
        path: tuple[str, ...],
        told: Told | None,
        timestep: Timestep | None,
    ) -> tuple[Generation, Decision]:
        """The generation of a call, and which of its steps it is."""
        found = runner.program.analysis
        conditions = [inputs[at] for at in found.inputs.conditions]
        current, agrees, foreign = known.find(conditions, path, runner, timestep)
        if current is not None and known.overtaken(current):
            current.forget()
        apart = foreign or (current is not None and current.runner is not runner)
        at = found.inputs.timestep
        rounding = 0.0 if at is None else rounding_of(inputs[at])
        newest = known.head(current)
        head = None if newest is None else newest.progress
        if head is None and known.told is not None and not known.begun:
            said = self._told(runner)
            if self._scheduled is not None and at is not None and timestep is not None:
                said = self._scheduled.in_units(said, timestep, inputs[at].dtype, told)
            known.told, warning = start(
                said, timestep, rounding, self._others(known), self.num_steps
            )
            if self._scheduled is None:
                self.warn(warning)
        decision = clock.decide(
            Situation(
                told=both(known.told, told),
                timestep=timestep,
                has_timestep=at is not None,
                rounding=rounding,
                identified=bool(conditions),
                current=None if current is None else current.progress,
                apart=apart,
                head=head,
                several=found.settings.separate or known.model.several,
                repeats=current is not None and current.may_repeat(inputs, found.inputs, agrees),
                seen=known.model.schedules.whole,
            )
        )
        if current is None or decision.place != "on":
            begun = self._begin(known, runner, decision, conditions, path)
            known.join(begun, decision, newest, conditions, timestep)
            replaces = decision.place == "generation" and not apart
            known.add(begun, current if replaces else None)
            if known.crowded:
                known.crowded = False
                self.warn(words.crowded(self._most))
            current = begun
        else:
            self._go_on(known, current, runner, decision, conditions, timestep, agrees, foreign)
        known.moved(timestep)
        self._say(known.said, decision.warnings)
        return current, decision

    def _begin(
        self,
        known: Generations,
        runner: Runner,
        decision: Decision,
        conditions: Sequence[Tensor],
        path: tuple[str, ...],
    ) -> Generation:
        """A generation that begins with this call."""
        begun = Generation(
            runner,
            self._plan(known, runner, decision.num_steps),
            decision,
            marks_of(conditions),
            path,
            SamplingRun(),
            owned_by_caller(),
            None if known.told is None else known.told.timesteps,
            self.warn,
        )
        settings = begun.plan.settings
        if decision.num_steps is not None:
            for warning in begun.plan.warnings:
                self.warn(warning)
            if not settings.scales:
                self.warn(words.stretched(settings.policy, settings.steps, len(begun.plan.steps)))
        return begun

    def _plan(self, known: Generations, runner: Runner, num_steps: int | None) -> Plan:
        """The plan of a generation.

        A policy that does not fit the shapes of a call is an error ahead of a run. In the middle of
        one, it goes on uncached.
        """
        found = runner.program.analysis
        try:
            return found.plan(num_steps)
        except PolicyError as error:
            if not known.begun and not self._calls:
                raise
            self.warn(words.misfit(str(error)))
            return found.uncached

    def _go_on(
        self,
        known: Generations,
        current: Generation,
        runner: Runner,
        decision: Decision,
        conditions: Sequence[Tensor],
        timestep: Timestep | None,
        agrees: Agreement,
        foreign: bool,
    ) -> None:
        """Carry on with a generation: it may have new conditions, another owner, another plan."""
        if foreign:
            known.moves, current.owner = True, owned_by_caller()
        if agrees == "equal":
            if current.progress.timestep != timestep and current.progress.calls:
                current.repeated, known.model.renews = True, False
            for mark in current.marks:
                mark.came_again = True
        else:
            pairs = zip(current.marks, conditions, strict=True)
            current.marks = [mark if mark.same(each) else Mark(each) for mark, each in pairs]
        if current.runner is not runner:
            current.move(runner, self._plan(known, runner, decision.num_steps))
        if self.implicit and (decision.num_steps or 0) != current.progress.num_steps:
            current.replan(self._plan(known, current.runner, decision.num_steps), decision)

    def _others(self, known: Generations) -> tuple[Progress, ...]:
        """How far the other models of the session have come."""
        heads = (each.head(None) for each in self._all if each is not known)
        return tuple(head.progress for head in heads if head is not None)

    def _note(
        self,
        known: Generations,
        generation: Generation,
        decision: Decision,
        runner: Runner,
    ) -> None:
        """Take note of a call that has been made."""
        known.called(generation)
        trail = generation.progress.trail
        settings = runner.program.analysis.settings
        if trail and not decision.again:
            known.model.schedules.note(trail, settings.steps)
        if generation.progress.finished and decision.num_steps is not None:
            known.model.read |= bool(trail)
            if trail and known.told is not None and not decision.again:
                known.model.schedules.add(trail)
                if known.told.timesteps is not None:  # as they were told, not as they were rounded
                    known.model.schedules.add(known.told.timesteps)

    def _record(self, attempt: Attempt, runner: Runner, record: StepRecord) -> None:
        """Keep the record of a call, for the report."""
        if not self.implicit:
            beside = attempt.expected and not runner.program.analysis.matches.sites
            self._calls.append((runner.program, replace(record, beside=beside)))

    def _hold(self) -> None:
        """Note how much is held, for the report."""
        held = self.generations
        self._cache_bytes = max(self._cache_bytes, sum(each.cache_bytes for each in held))
        self._hoisted_bytes = max(self._hoisted_bytes, sum(each.hoisted_bytes for each in held))

    def _say(self, said: set[str], warnings: Sequence[str]) -> None:
        """Give warnings that were not ``said``: in a session, or of an image outside of any."""
        for warning in warnings:
            if not self.implicit:
                self.warn(warning)
            elif warning not in said:
                said.add(warning)
                log.warning("toca_fx: %s", warning)

    def warn(self, message: str | None) -> None:
        """Log a warning once and keep it for the report; None: there is none.

        What only the writer of the loop can mend is a note, if that is a pipeline's.
        """
        if message is None:
            return
        if self._scheduled is not None and words.is_of_the_loop(message):
            self._scheduled.notes[message] = None
        elif message not in self._warnings:
            if not self.implicit:
                self._warnings[message] = None
            log.warning("toca_fx: %s", message)

    def invalidate(self) -> None:
        """Read nothing that was computed so far: the next step of each generation is full.

        For writes to weights and captions that nobody can see: through ``.data``, numpy or dlpack
        to the memory they have, and any to tensors made in inference mode.
        """
        for generation in self.generations:
            generation.forget()

    def complete(self) -> None:
        """End the run: warn if it had fewer steps than planned, or none."""
        if not self._calls:
            self.warn(words.NO_CALL)
        heads = [known.head(None) for known in self._all]
        came = [head.progress for head in heads if head is not None]
        steps = sum(head.position for head in came)
        for head in came:
            # Experts that share the steps of one run have a part of them each.
            shared = len(came) > 1 and steps >= (self.num_steps or head.num_steps)
            if not head.finished and not shared:
                self.warn(words.ended_early(head.num_steps, head.position))

    def close(self) -> None:
        """Free the memories; records and report stay.

        There is no warning if steps are missing. An implicit session can be used again.
        """
        self.closed = not self.implicit
        for known in self._all:
            for generation in tuple(known.all):
                known.drop(generation)
        for model in tuple(self._untold):
            model.untold = None
        self._models.clear()

    def report(self) -> Report:
        """The report on what has been done so far in this session."""
        return make_report(
            self._calls, self._cache_bytes, self._hoisted_bytes, tuple(self._warnings)
        )
