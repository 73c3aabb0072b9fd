"""Sessions: the generation that a model call belongs to, and what has been done so far.

A *generation* is one sampling run of one model and one guidance branch. The clock says which of its
steps a call is, the plan what the step does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toca_fx.lower.program import Program
from toca_fx.runtime import clock, watch
from toca_fx.runtime.clock import Situation
from toca_fx.runtime.generation import Generation
from toca_fx.runtime.report import Report, StepRecord, make_report
from toca_fx.runtime.runner import Runner

log = logging.getLogger(__name__)

_TIMESTEPS_READ = 2  # of a model's first generation: they show whether branches alternate


@dataclass(eq=False)
class ModelKey:
    """Identity of one model, across its recompilations and through all sessions.

    ``timesteps_read`` says whether the first timesteps of one of its generations have been read.
    """

    timesteps_read: bool = False


@dataclass
class ModelRun:
    """The ``generations`` of one model in one session, by guidance branch.

    ``calls`` is how many the model has had.
    """

    generations: dict[str, Generation] = field(default_factory=dict)
    calls: int = 0


class Session:
    """One sampling run, or (implicit) all runs outside of any ``toca_fx.session``.

    ``num_steps`` are the model calls of the run (None: those of the policy), ``timesteps`` [T] the
    timestep of each, where they are known.
    """

    def __init__(
        self,
        num_steps: int | None = None,
        timesteps: Tensor | None = None,
        *,
        implicit: bool = False,
    ) -> None:
        self.num_steps, self._timesteps, self._implicit = num_steps, timesteps, implicit
        self._models: weakref.WeakKeyDictionary[ModelKey, ModelRun] = weakref.WeakKeyDictionary()
        self._calls: list[tuple[Program, StepRecord]] = []
        self._warnings: dict[str, None] = {}
        self._cache_bytes = self._hoisted_bytes = 0

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs that the calls so far have run, in order; none of an implicit session."""
        return tuple(dict.fromkeys(program for program, _ in self._calls))

    @property
    def generations(self) -> tuple[Generation, ...]:
        """The generations that hold caches now: the last one of each model and branch.

        A closed session has none.
        """
        runs = self._models.values()
        return tuple(generation for run in runs for generation in run.generations.values())

    def call(self, model: ModelKey, runner: Runner, inputs: Sequence[Any]) -> Any:
        """Run the model's next step; returns its outputs."""
        found = runner.program.analysis
        timestep_at = found.inputs.timestep
        run = self._models.setdefault(model, ModelRun())
        branch = _branch.get()
        if not branch and found.settings.separate:
            branch = "first" if run.calls % 2 == 0 else "second"
        current = run.generations.get(branch)
        timestep = None if timestep_at is None else self._read(inputs[timestep_at], model, current)
        decision = clock.decide(
            Situation(
                implicit=self._implicit,
                has_timestep=timestep_at is not None,
                timestep=timestep,
                current=None if current is None else current.progress,
                program_changed=current is not None and current.runner is not runner,
            )
        )
        for warning in decision.warnings:
            self.warn(warning)
        if current is None or decision.begins:
            current = self._begin(run, branch, runner, decision.position)
        try:
            outputs, record = current.run(decision, timestep, inputs, branch)
        except BaseException:
            if self._implicit:
                run.generations.pop(branch).close()
            raise
        run.calls += 1
        if not self._implicit:
            self._calls.append((runner.program, record))
        return outputs

    def _begin(self, run: ModelRun, branch: str, runner: Runner, position: int) -> Generation:
        """Begin a generation, which replaces the branch's last one."""
        if branch in run.generations:
            run.generations.pop(branch).close()
        begun = run.generations[branch] = Generation(
            runner, self.num_steps, position, self._timesteps, self.warn
        )
        storages = [generation.storage for generation in self.generations]
        self._cache_bytes = sum(storage.nbytes for storage in storages)
        self._hoisted_bytes = sum(storage.hoisted.nbytes for storage in storages)
        settings = begun.plan.settings
        for warning in begun.plan.warnings:
            self.warn(warning)
        self.warn(clock.stretched(settings.policy, settings.steps, len(begun.plan.steps)))
        return begun

    def _read(self, timestep: Tensor, model: ModelKey, current: Generation | None) -> float | None:
        """The timestep's value; None if it is not needed.

        On an accelerator reading it waits for the device. A session that knows its timesteps does
        without (the device itself compares, see ``Conditioning``), and one that knows their number
        reads the first two of its model's first generation.
        """
        if timestep.numel() == 0:
            return None
        position = 0 if current is None else current.progress.position
        if watch.reading_waits(timestep) and not self._implicit:
            if self._timesteps is not None or model.timesteps_read or position >= _TIMESTEPS_READ:
                return None
            model.timesteps_read = position + 1 == _TIMESTEPS_READ
        return float(timestep.max())  # frames that are given, not denoised, are at timestep 0

    def warn(self, message: str | None) -> None:
        """Log a warning once and keep it for the report; None: there is none."""
        if message is not None and message not in self._warnings:
            self._warnings[message] = None
            log.warning(message)

    def complete(self) -> None:
        """End the run: warn if it had fewer steps than planned."""
        calls = sum(run.calls for run in self._models.values())
        for generation in self.generations:
            # Experts that share the steps of one run (`transformer` and `transformer_2`) have a
            # part of them each.
            shared = len(self._models) > 1 and calls >= generation.progress.num_steps
            if not shared:
                self.warn(clock.ended_early(generation.progress))

    def close(self) -> None:
        """Free the caches; records and report stay.

        There is no warning if steps are missing. An implicit session can be used again, and gives
        its warnings again.
        """
        for generation in self.generations:
            generation.close()
        self._models.clear()
        if self._implicit:
            self._warnings.clear()

    def report(self) -> Report:
        """The report on what has been done so far in this session."""
        return make_report(
            self._calls,
            self.num_steps,
            self._cache_bytes,
            self._hoisted_bytes,
            tuple(self._warnings),
        )

    def least_bytes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The bytes that each call has to move at least: of the uncached model, and of our step.

        They are those of weights, inputs and caches.
        """
        calls = self._calls
        uncached = tuple(program.analysis.uncached_bytes for program, _ in calls)
        ours = tuple(program.step_bytes(self.num_steps, record.plan) for program, record in calls)
        return uncached, ours


_session: ContextVar[Session | None] = ContextVar("toca_fx_session", default=None)
# By task or thread, not in a context variable: those are inherited, and tasks would share their
# parent's session.
_implicit: weakref.WeakKeyDictionary[object, Session] = weakref.WeakKeyDictionary()
_branch: ContextVar[str] = ContextVar("toca_fx_branch", default="")


@contextmanager
def session(
    num_steps: int | None = None, *, timesteps: Sequence[float] | Tensor | None = None
) -> Iterator[Session]:
    """One generation: every toca-compiled model called inside has new caches and a new clock.

    ``num_steps`` is the number of model calls of the sampling run (per guidance branch); by default
    the policy's ``sampler.steps``. Sessions nest, and each thread or asyncio task sees only its
    own. Calls beyond ``num_steps`` are full steps, with a warning. Twins of one model compiled with
    one policy count as one model. ``timesteps`` are the values of the model's timestep argument,
    call by call: values that depend only on them and the conditions, such as the modulations of all
    blocks, are then computed for all steps at once, if they fit into the policy's
    ``hoisting.memory``.

    Raises:
        ValueError: ``num_steps`` is not a positive integer, or is not the number of ``timesteps``.
    """
    is_integer = isinstance(num_steps, int) and not isinstance(num_steps, bool)
    if num_steps is not None and (not is_integer or num_steps < 1):
        raise ValueError(
            f"session(num_steps={num_steps!r}): expected a positive integer, the number of model "
            "calls"
        )
    known = None
    if timesteps is not None:
        # Numbers keep all of their digits: they are compared with the model's, in its precision. A
        # tensor on a device is read here, once.
        known = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu").flatten()
    if known is not None and num_steps not in (None, len(known)):
        raise ValueError(
            f"session(num_steps={num_steps}, timesteps=...): {len(known)} timesteps were given, "
            "one is needed for each step"
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
    """The guidance branch that the calls inside belong to, such as "cond" or "uncond".

    Branches that are called one after the other have caches and a clock each.

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
