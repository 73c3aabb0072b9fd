"""Sessions: one generation's caches, step clock and records.

A *generation* is one sampling run of one model and one guidance branch. Its clock counts model
calls; the plan says what each call does. Caches belong to the generation, so nothing survives into
the next one, and its first step is always full, so nothing is read before it was written.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toca_fx.lower.program import Program
from toca_fx.plan.plan import StepPlan
from toca_fx.runtime import watch
from toca_fx.runtime.conditioning import Conditioning
from toca_fx.runtime.report import Launch, Report, SiteRecord, StepRecord

log = logging.getLogger(__name__)


_LOOKS = 2
_SCORES_READ = {
    read: torch.tensor(read) for read in (False, True)
}  # a step graph is given one of them


class Lane:
    """Identity of one model's code across recompilations; its generations are kept apart from other
    models'.

    ``was_looked_at`` says whether the first timesteps of a generation have been looked at.
    """

    was_looked_at = False


class Generation:
    """Clock, storage and conditioning of one sampling run, for one program."""

    def __init__(
        self,
        program: Program,
        num_steps: int | None,
        position: int,
        timesteps: Tensor | None,
        timestep_at: int | None,
        warn: Callable[[str], None],
    ) -> None:
        self.program, self.position = program, position
        self.plan = program.plan(num_steps)
        self.fresh_caches = True
        self.ambiguous = False
        self.timestep: float | None = None
        self.direction = 0.0
        self.storage = program.lend(self.plan, 0 if timesteps is None else len(timesteps))
        self.conditioning = Conditioning(
            program, self.storage.hoisted, timesteps, timestep_at, warn
        )

    def close(self) -> None:
        """Give the storage back; nothing can be run any more."""
        self.conditioning.close()
        self.program.take_back(self.storage)

    @property
    def finished(self) -> bool:
        """Whether every planned step has run."""
        return self.position >= len(self.plan.steps)

    def runs_backwards(self, timestep: float) -> bool:
        """Whether ``timestep`` goes against the direction of the run so far: the sign of a new
        generation.
        """
        moved = 0.0 if self.timestep is None else timestep - self.timestep
        return moved * self.direction < 0

    def observe(self, timestep: float) -> None:
        """Take note of this call's timestep."""
        if self.timestep is not None and not self.direction:
            self.direction = timestep - self.timestep
        self.timestep = timestep

    def next_step(self) -> StepPlan:
        """What this call does: as planned, but full on fresh caches, past the last step, and where
        branches may be mixed.
        """
        doubtful = self.fresh_caches or self.finished or self.ambiguous
        return self.plan.full_step(self.position) if doubtful else self.plan.steps[self.position]

    def run(self, inputs: Sequence[Any], branch: str) -> tuple[Any, StepRecord]:
        """Run one step. If it fails, the caches count as lost: the next step is full."""
        began = time.perf_counter()
        step = self.next_step()
        self.fresh_caches = True
        compiled = self.program.step(self.plan, step.modes)
        hoisted_flops = self.conditioning.prepare(inputs, self.position)
        selection_seconds = 0.0

        def body(inputs: Sequence[Any]) -> Any:
            """All that the device does in a step. What differs between two steps of one ``key`` is
            in tensors.
            """
            nonlocal selection_seconds
            selector, selects = self.storage.selector, time.perf_counter()
            given = selector.select(step) if step.kind != "full" else {}
            selection_seconds = time.perf_counter() - selects
            self.conditioning.bring(inputs, self.position)
            outputs = compiled(
                inputs, {**self.storage.tensors, **given, "read": _SCORES_READ[step.read]}
            )
            if step.kind == "full":
                selector.full()
            else:
                selector.advance()
            return outputs

        recordings, reason = self.storage.recordings, self.storage.reason
        if recordings is None:
            outputs = body(inputs)
        else:
            key = (step.modes, step.fresh, step.read, self.conditioning.listed)
            outputs, reason = recordings.run(
                (step.modes, step.read, self.conditioning.listed), key, body, inputs
            )
        launch = Launch("recorded" if recordings is not None and not reason else "queued", reason)
        self.fresh_caches = False
        self.position += 1
        seconds = time.perf_counter() - began
        return outputs, StepRecord(
            step.index, step.kind, branch, seconds, selection_seconds, step, hoisted_flops, launch
        )


@dataclass
class _Track:
    """The generations of one lane in one session, by guidance branch, and how often the lane was
    called.
    """

    generations: dict[str, Generation]
    calls: int = 0


class Session:
    """One sampling run, or (implicit) all runs outside of any ``toca_fx.session``."""

    def __init__(
        self,
        num_steps: int | None = None,
        timesteps: Tensor | None = None,
        *,
        implicit: bool = False,
    ) -> None:
        self.num_steps, self._timesteps, self._implicit = num_steps, timesteps, implicit
        self._tracks: weakref.WeakKeyDictionary[Lane, _Track] = weakref.WeakKeyDictionary()
        self._records: list[tuple[Program, StepRecord]] = []
        self._warnings: dict[str, None] = {}
        self._cache_bytes = self._hoisted_bytes = 0

    def call(
        self, lane: Lane, program: Program, inputs: Sequence[Any], timestep_at: int | None
    ) -> Any:
        """Run the model's next step. ``timestep_at`` is the position of the timestep among the
        inputs.
        """
        timestep: Tensor | None = None if timestep_at is None else inputs[timestep_at]
        if timestep is None and self._implicit:
            self.warn(
                "no argument of the model is recognised as the timestep, so that a new generation is not noticed before the policy's steps "
                "have run; put each generation into a toca_fx.session()"
            )
        track = self._tracks.setdefault(lane, _Track({}))
        branch = _branch.get()
        if not branch and program.policy.guidance.layout == "separate":
            branch = "first" if track.calls % 2 == 0 else "second"
        now = self._read(timestep, lane, track.generations.get(branch))
        generation = self._generation(track, branch, program, now, timestep_at)
        try:
            outputs, record = generation.run(inputs, branch)
        except BaseException:
            if self._implicit:
                track.generations.pop(branch).close()
            raise
        track.calls += 1
        if now is not None:
            generation.observe(now)
        if not self._implicit:
            self._records.append((program, record))
        return outputs

    def _generation(
        self,
        track: _Track,
        branch: str,
        program: Program,
        now: float | None,
        timestep_at: int | None,
    ) -> Generation:
        current = track.generations.get(branch)
        position = 0
        if current is not None and current.program is not program:
            # Other shapes, dtype or device: nothing of the old caches fits. An explicit session's
            # clock goes on.
            if not self._implicit:
                position = current.position
                self.warn(
                    "the inputs changed their shape, dtype or gradient mode in the middle of a generation, and the caches were "
                    "dropped; if two kinds of calls alternate, wrap one of them in toca_fx.branch(name)"
                )
            current = None
        turned = current is not None and now is not None and current.runs_backwards(now)
        if (
            current is not None
            and self._implicit
            and now is not None
            and current.direction
            and current.finished != turned
        ):
            planned = len(current.plan.steps)
            self.warn(
                f"the policy has {planned} steps, and a generation went on after them; the next one began in the middle of it"
                if current.finished
                else f"a generation ended after {current.position} steps; the policy has {planned}, of which it had the first ones"
                " only. Put each generation into a toca_fx.session(num_steps=...)"
            )
        if current is not None and self._implicit and (current.finished or turned):
            current = None
        if current is not None and current.finished:
            self.warn(
                f"the model was called more often than the session's {len(current.plan.steps)} steps; the calls beyond "
                "are full steps. Give session(num_steps=...) the number of model calls"
            )
        if current is not None and now is not None and now == current.timestep:
            # Guidance branches, or generations of one call each. A session's clock is the caller's
            # word; here is none.
            current.ambiguous = self._implicit
            consequence = (
                "nothing is cached from here on"
                if self._implicit
                else "they share caches and clock"
            )
            self.warn(
                f"two calls in a row had the same timestep, and {consequence}; if they are guidance branches, set `guidance: "
                "{layout: separate}` in the policy, or wrap each kind of call in toca_fx.branch(name)"
            )
        if current is None:
            if branch in track.generations:
                track.generations.pop(branch).close()
            current = track.generations[branch] = Generation(
                program, self.num_steps, position, self._timesteps, timestep_at, self.warn
            )
            storages = [
                generation.storage
                for track in self._tracks.values()
                for generation in track.generations.values()
            ]
            self._cache_bytes = sum(storage.nbytes for storage in storages)
            self._hoisted_bytes = sum(storage.hoisted.nbytes for storage in storages)
            for warning in current.plan.warnings:
                self.warn(warning)
            steps = program.policy.sampler.steps
            if len(current.plan.steps) != steps:
                self.warn(
                    f"policy `{program.policy.name}` was tuned for {steps} steps and runs {len(current.plan.steps)}: "
                    "its slopes and windows are stretched over them"
                )
        return current

    def _read(
        self, timestep: Tensor | None, lane: Lane, current: Generation | None
    ) -> float | None:
        """The timestep's value, where it decides something.

        On an accelerator reading it waits for the device. A session that was told its timesteps
        does without (the device itself watches whether they are those, see ``Conditioning``), and
        one that was told their number reads the first two of its model's first generation.
        """
        if timestep is None or timestep.numel() == 0:
            return None
        position = 0 if current is None else current.position
        if watch.reading_waits(timestep) and not self._implicit:
            if self._timesteps is not None or lane.was_looked_at or position >= _LOOKS:
                return None
            lane.was_looked_at = position + 1 == _LOOKS
        return float(timestep.max())  # frames that are given, not denoised, are at timestep 0

    def warn(self, message: str) -> None:
        """Log a warning once and keep it for the report."""
        if message not in self._warnings:
            self._warnings[message] = None
            log.warning(message)

    def complete(self) -> None:
        """The run has come to its end: warn if the clock has not."""
        called = sum(track.calls for track in self._tracks.values())
        for track in self._tracks.values():
            for generation in track.generations.values():
                # Experts that share the steps of one run (`transformer` and `transformer_2`) have a
                # part of them each.
                shared = len(self._tracks) > 1 and called >= len(generation.plan.steps)
                if not generation.finished and not shared:
                    self.warn(
                        f"the session was planned for {len(generation.plan.steps)} steps and had {generation.position}, so that the "
                        "policy's last steps were left out. Give session(num_steps=...) the number of model calls, or "
                        "session(timesteps=...) those of the scheduler after its set_timesteps"
                    )

    def close(self) -> None:
        """Free the caches; records and report stay. A session that is closed before its last step
        gives no warning.
        """
        for track in self._tracks.values():
            for generation in track.generations.values():
                generation.close()
        self._tracks.clear()

    def report(self) -> Report:
        """What has been done so far in this session."""
        programs = list(dict.fromkeys(program for program, _ in self._records))
        sites = [
            SiteRecord(
                site.path,
                site.kind,
                site.layer,
                site.tokens,
                tuple(r.plan.fresh[i] for p, r in self._records if p is program),
            )
            for program in programs
            for i, site in enumerate(program.matches.sites)
        ]
        return Report(
            steps=tuple(record for _, record in self._records),
            sites=tuple(sites),
            step_flops=tuple(
                program.step_flops(self.num_steps, record.plan) for program, record in self._records
            ),
            flops_uncached=sum(program.uncached_flops for program, _ in self._records),
            cache_bytes=self._cache_bytes,
            hoisted_bytes=self._hoisted_bytes,
            compiled_graphs=sum(program.compiled_graphs for program in programs),
            warnings=tuple(self._warnings),
        )

    def least_bytes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For each call, the bytes that the uncached model and our step have to move at least:
        weights, inputs and caches.
        """
        uncached = tuple(program.uncached_bytes for program, _ in self._records)
        return uncached, tuple(
            program.step_bytes(self.num_steps, record.plan) for program, record in self._records
        )


_session: ContextVar[Session | None] = ContextVar("toca_fx_session", default=None)
# By task or thread, not in a context variable: those are inherited, and tasks would share their
# parent's session.
_implicit: weakref.WeakKeyDictionary[object, Session] = weakref.WeakKeyDictionary()
_branch: ContextVar[str] = ContextVar("toca_fx_branch", default="")


@contextmanager
def session(
    num_steps: int | None = None, *, timesteps: Sequence[float] | Tensor | None = None
) -> Iterator[Session]:
    """One generation: fresh caches and a step clock of its own for every toca-compiled model called
    inside.

    ``num_steps`` is the number of model calls of the sampling run (per guidance branch); by default
    the policy's ``sampler.steps``. Sessions nest, and each thread or asyncio task sees only its
    own. Calls beyond ``num_steps`` are full steps, with a warning. Twins of one model compiled with
    one policy count as one model. ``timesteps`` are the values of the model's timestep argument,
    call by call: what depends on nothing but them and the conditions, such as the modulations of
    all blocks, is then computed for all steps at once, if that fits into the policy's
    ``hoisting.memory``.

    Raises:
        ValueError: ``num_steps`` is not a positive integer, or is not the number of ``timesteps``.
    """
    if num_steps is not None and (
        isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1
    ):
        raise ValueError(
            f"session(num_steps={num_steps!r}): expected a positive integer, the number of model calls"
        )
    # Numbers keep all of their digits: they are compared with what the model is called with, in its
    # precision. A list that lies on a device is read here, once.
    known = (
        None
        if timesteps is None
        else torch.as_tensor(timesteps, dtype=torch.float64, device="cpu").flatten()
    )
    if known is not None and num_steps not in (None, len(known)):
        raise ValueError(
            f"session(num_steps={num_steps}, timesteps=...): {len(known)} timesteps were given, one is needed for each step"
        )
    run = Session(num_steps if known is None else len(known), known)
    token = _session.set(run)
    try:
        yield run
        run.complete()
    finally:
        _session.reset(token)
        run.close()


@contextmanager
def branch(name: str) -> Iterator[None]:
    """Keep the state of guidance branches apart that are called one after the other, e.g. "cond"
    and "uncond".

    Raises:
        ValueError: ``name`` is not a non-empty string.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f'branch({name!r}): expected a non-empty name, such as "uncond"')
    token = _branch.set(name)
    try:
        yield
    finally:
        _branch.reset(token)


def current_session() -> Session:
    """The innermost open session of this thread or task, else its implicit one."""
    run = _session.get()
    if run is not None:
        return run
    try:
        owner: object = asyncio.current_task() or threading.current_thread()
    except RuntimeError:  # no event loop runs here
        owner = threading.current_thread()
    if owner not in _implicit:
        _implicit[owner] = Session(implicit=True)
    return _implicit[owner]
