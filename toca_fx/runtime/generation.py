"""A generation: one sampling run of one model and one guidance branch.

It runs the steps that the clock decides on.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from toca_fx.lower.analysis import Inputs
from toca_fx.lower.onload import is_offloaded, moved_bytes
from toca_fx.lower.step import CompiledStep
from toca_fx.plan.buffers import READ, Buffer
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.runtime import words
from toca_fx.runtime.clock import Decision, Progress
from toca_fx.runtime.conditioning import Conditioning
from toca_fx.runtime.gate import Choice, Gate, SamplingRun
from toca_fx.runtime.histories import Histories, Moment
from toca_fx.runtime.identity import Agreement, Mark, Seen
from toca_fx.runtime.report import Launch, StepRecord
from toca_fx.runtime.runner import MOVING, Runner
from toca_fx.runtime.schedules import Schedule, Timestep
from toca_fx.runtime.signals import Facts
from toca_fx.runtime.storage import Storage

_MANY = 3  # calls in a row with other weights

# A step graph gets one of them as its input ``read``.
_SCORES_READ = {read: torch.tensor(read) for read in (False, True)}


class Generation:
    """Plan, storage, conditioning and progress of one sampling run, by one ``runner``.

    It owns its memories from its first step to its last one, and the next generation has others.
    ``marks`` are those of its conditions, ``path`` the names of its branch, ``run`` the sampling
    run that it is a branch of, ``owner`` the thread or task that calls it. ``num_steps`` are those
    of its run (None: nobody knows, and it keeps nothing). ``timesteps`` are those of all its calls,
    where they are known. ``renewed`` counts how often in a row its run had new conditions,
    ``repeated`` says that these came again. ``cache_bytes`` and ``hoisted_bytes`` are what it holds
    while it goes on. ``latest`` is the decision on its last call, as it was carried out, and
    ``parts`` are the generations of the other graphs of a model that was captured in several.
    ``warn`` takes what the user has to know.
    """

    def __init__(
        self,
        runner: Runner,
        plan: Plan,
        decision: Decision,
        marks: Sequence[Mark],
        path: tuple[str, ...],
        run: SamplingRun,
        owner: weakref.ref[Any],
        timesteps: Schedule | None,
        warn: Callable[[str], None],
    ) -> None:
        self.runner, self.marks, self.path, self.run = runner, marks, path, run
        self.owner, self.timesteps = owner, timesteps
        self.progress = Progress(decision.num_steps or 0, decision.position)
        self.running = self.repeated = False
        self.renewed = self.cache_bytes = self.hoisted_bytes = 0
        self.latest = decision
        self._latents: Mark | None = None  # of its last call
        self._lists_twice = timesteps is not None and len(set(timesteps)) < len(timesteps)
        self.parts: dict[Hashable, Generation] = {}
        self._forgotten = False
        self._state: tuple[Runner, Seen] | None = None
        self._changes = 0  # in a row
        self.plan = plan
        self.storage: Storage | None = None
        self.conditioning: Conditioning | None = None
        self._keeps, self._warn = decision.num_steps is not None, warn

    @property
    def label(self) -> str:
        """The branch, for reports."""
        return "/".join(self.path)

    @property
    def over(self) -> bool:
        """Whether all steps of its run have been made."""
        return self._keeps and self.progress.finished

    @property
    def unknowable(self) -> bool:
        """Whether nobody has any of its conditions any more."""
        return bool(self.marks) and all(mark.gone for mark in self.marks)

    def join(self, other: Generation, timestep: Timestep | None) -> None:
        """Be a branch of the run of ``other``, from a call at ``timestep`` on."""
        self.run = other.run
        alike = other.path == self.path and other.runner is self.runner
        if alike and not other.repeated and timestep != other.progress.timestep:
            self.renewed = other.renewed + 1

    def replan(self, plan: Plan, decision: Decision) -> None:
        """Go on by another plan, of the number of steps that is known by now."""
        self.close()
        for part in self.parts.values():
            part.close()
        self.parts.clear()
        self.plan = plan
        self.progress = replace(self.progress, num_steps=decision.num_steps or 0)
        self._keeps = decision.num_steps is not None

    def move(self, runner: Runner, plan: Plan) -> None:
        """Go on with another program of the same model: it was captured again."""
        lost, storage, given_back = self.progress.lost, self.storage, self.runner.release
        self.progress = replace(self.progress, lost=True)
        conditioning = self.conditioning
        self.conditioning = self.storage = None
        self.runner, self.plan = runner, plan
        if conditioning is not None:
            conditioning.close()
        if storage is None:
            return
        taken = self._memories()[0].take_over(storage)
        given_back(storage)
        self.progress = replace(self.progress, lost=lost or not taken)

    def close(self) -> None:
        """Give the memories back; a later step is full, on new ones."""
        self.progress = replace(self.progress, lost=True)
        conditioning, storage = self.conditioning, self.storage
        self.conditioning = self.storage = None
        if conditioning is not None:
            conditioning.close()
        if storage is not None and not self.running:  # a step under way has it still
            self.runner.release(storage)

    def forget(self) -> None:
        """Read nothing that was computed so far: the next step is full, on values made anew."""
        self.progress = replace(self.progress, lost=True)
        self._forgotten = True
        if self.conditioning is not None:
            self.conditioning.forget()
        for part in self.parts.values():
            part.forget()

    def may_repeat(self, inputs: Sequence[Any], roles: Inputs, agrees: Agreement) -> bool:
        """Whether a call at the timestep of the last one may be of the same step.

        So it may if it has the same latents (in inference mode nobody knows whether they were
        written to since), or a condition made anew and no name of a branch.
        """
        if agrees != "equal" and self.marks and not self.path:
            return True
        at = roles.latents
        return at is not None and self._latents is not None and self._latents.same(inputs[at])

    def _mark(self, latents: Tensor | None) -> Mark | None:
        """The mark of latents, where it is asked for: where a session lists a timestep twice."""
        return Mark(latents) if latents is not None and self._lists_twice else None

    def run_step(
        self, decision: Decision, timestep: Timestep | None, inputs: Sequence[Any]
    ) -> tuple[Any, StepRecord]:
        """Run one step, at ``timestep`` (None: not read); returns the outputs and the record.

        If it raises, wherever that is, the memories count as lost and the call as not made.
        """
        began, moved = time.perf_counter(), moved_bytes()
        before, position = self.progress, decision.position
        before = replace(before, lost=self._is_of_another(inputs) or before.lost)
        self.progress, self._forgotten = replace(before, lost=True), False
        storage, conditioning = self._memories()
        self.latest = decision = replace(decision, full=decision.full or before.lost)
        if decision.full:  # in doubt, older values may be another image's
            storage.forget_steps()
        now, gate = self._moment(position, timestep), storage.gate
        facts = self._facts(inputs, now, storage.histories)
        if gate is not None:
            gate.observe(facts)
        choice = self._choose(decision, before.lost, gate)
        step = self.plan.full_step(position) if choice.full else self.plan.steps[position]
        compiled = self.runner.program.step(self.plan, step.modes)
        if gate is not None:
            gate.begin(facts, step.kind == "full")
        storage.histories.prepare(step, now)
        wanted = self.runner.program.analysis.wanted(compiled.graph)
        beside_flops = conditioning.prepare(inputs, position, timestep, wanted)
        beside_flops += self.runner.program.analysis.gate_flops(self.plan)
        outputs, launch, selection_seconds = self._launch(
            compiled, step, inputs, position, storage, conditioning
        )
        storage.histories.note(step, now)
        if gate is not None:
            at = self.runner.program.analysis.output
            gate.end(facts, step.kind == "full", None if at is None else outputs[at])
        seconds = time.perf_counter() - began
        record = StepRecord(
            step.index,
            step.kind,
            self.label,
            seconds,
            selection_seconds,
            step,
            self.plan,
            beside_flops,
            launch,
            choice.reason,
            timestep or self._listed(position),
            moved_bytes=moved_bytes() - moved,
        )
        self.progress = replace(before.advance(decision, timestep), lost=self._forgotten)
        self._latents = self._mark(facts.latents)
        if not self._keeps or self.progress.finished:
            self.running = False
            self.close()
        return outputs, record

    def _is_of_another(self, inputs: Sequence[Any]) -> bool:
        """Whether weights, or numbers of the model, are others than at the last call.

        What was computed with those tells nothing: an adapter came, went, or has another scale.
        """
        if not self._keeps:
            return False
        at, before = self.runner.weights_at, self._state
        if before is not None and before[0] is self.runner and not before[1].differ(inputs):
            self._changes = 0
            return False
        seen = Seen(inputs, at, frozenset(at))
        self._state = self.runner, seen
        if before is None or (before[0] is not self.runner and seen.alike(before[1])):
            return False
        self._changes += 1
        if self._changes == _MANY:
            self._warn(words.CHANGING)
        return True

    def _choose(self, decision: Decision, lost: bool, gate: Gate | None) -> Choice:
        """Whether the step is full whatever the plan says, and why."""
        position, steps = decision.position, self.plan.steps
        planned = position >= len(steps) or steps[position].kind == "full"
        if decision.full:
            return Choice(True, "planned" if planned else "nothing kept" if lost else "in doubt")
        if planned or gate is None:
            return Choice(position >= len(steps), "planned")
        if position in self.run.choices:
            return self.run.choose(position, gate)
        self._check(gate)
        choice, later = self.run.choose(position, gate), steps[position + 1 :]
        is_last = all(step.kind == "full" for step in later)
        if is_last and all(each.full for each in self.run.choices.values()):
            self._warn(words.never_open(gate.name, gate.threshold))
        return choice

    def _check(self, gate: Gate) -> None:
        """Warn of a gate that decides, and has nothing to measure."""
        found = self.runner.program.analysis
        places = {
            "latents": found.inputs.latents,
            "output": found.output,
            "first block": found.matches.first_block or None,
        }
        if any(places[each] is None for each in gate.signal.needs):
            self._warn(words.unmeasured(gate.name))

    def _facts(self, inputs: Sequence[Any], now: Moment, histories: Histories) -> Facts:
        """What the signal of a gate may know ahead of the step."""
        program = self.runner.program
        found, at = program.analysis, program.analysis.inputs
        latents = None if at.latents is None else inputs[at.latents]
        timesteps = None if at.timestep is None else inputs[at.timestep]
        known = found.matches.first_block
        first_block = (lambda: program.first_block(inputs)) if known else None
        return Facts(latents, timesteps, now, histories, first_block)

    def _moment(self, position: int, timestep: Timestep | None) -> Moment:
        """The step at ``position``, for forecasts; one of several timesteps counts as unknown."""
        timestep = timestep or self._listed(position)
        if timestep is None or len(set(timestep)) > 1:
            return Moment(position, None)
        return Moment(position, timestep[0])

    def _listed(self, position: int) -> Timestep | None:
        """The timestep that is listed for ``position``, if one is."""
        listed = self.timesteps or ()
        return listed[position] if position < len(listed) else None

    def _memories(self) -> tuple[Storage, Conditioning]:
        if self.storage is None or self.conditioning is None:
            known = 0 if self.timesteps is None else len(self.timesteps)
            storage = self.runner.acquire(self.plan, known)
            self.conditioning = Conditioning(
                self.runner, storage.hoisted, self.timesteps, self._warn
            )
            self.storage = storage
            self.cache_bytes, self.hoisted_bytes = storage.nbytes, storage.hoisted.nbytes
        return self.storage, self.conditioning

    def _launch(
        self,
        compiled: CompiledStep,
        step: StepPlan,
        inputs: Sequence[Any],
        position: int,
        storage: Storage,
        conditioning: Conditioning,
    ) -> tuple[Any, Launch, float]:
        """Run the ``compiled`` step, as a recording where that is possible.

        Returns the model's outputs, how the step was launched, and the seconds that selecting
        tokens took.
        """
        selection_seconds, histories = 0.0, storage.histories.tensors

        def body(inputs: Sequence[Any]) -> Any:
            """All that the device does in a step; steps of one ``key`` differ in tensors only."""
            nonlocal selection_seconds
            selector, given = storage.selector, dict[Buffer, Tensor]()
            if step.kind in ("partial", "mixed"):
                selects = time.perf_counter()
                given = selector.select(step)
                selection_seconds = time.perf_counter() - selects
            conditioning.bring(inputs, position)
            read = {READ: _SCORES_READ[step.read]}
            outputs = compiled(inputs, {**storage.tensors, **histories, **given, **read})
            if step.kind == "full":
                selector.full()
            elif step.kind == "skip":
                selector.skip(step)
            else:
                selector.advance()
            return outputs

        recordings, reason = storage.recordings, storage.reason
        if recordings is not None and is_offloaded():  # since its generation began, or before
            recordings, reason = None, MOVING
        if recordings is None:
            outputs = body(inputs)
            return outputs, Launch("queued", reason), selection_seconds
        kind = (step.modes, step.read, conditioning.listed, storage.histories.turns)
        outputs, reason = recordings.run(kind, (*kind, step.fresh), body, inputs)
        return outputs, Launch("queued" if reason else "recorded", reason), selection_seconds
