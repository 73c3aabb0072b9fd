"""A generation: one sampling run of one model and one guidance branch.

It runs the steps that the clock decides on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from toca_fx.lower.step import CompiledStep
from toca_fx.plan.buffers import READ
from toca_fx.plan.plan import StepPlan
from toca_fx.runtime.clock import Decision, Progress
from toca_fx.runtime.conditioning import Conditioning
from toca_fx.runtime.report import Launch, StepRecord
from toca_fx.runtime.runner import Runner

# A step graph gets one of them as its input ``read``.
_SCORES_READ = {read: torch.tensor(read) for read in (False, True)}


class Generation:
    """Plan, storage, conditioning and progress of one sampling run, by one ``runner``.

    It owns its caches, and the next generation has others. ``num_steps`` None are the policy's
    steps; ``position`` is the first step that it runs. ``timesteps`` [T] are those of all its
    calls, where they are known; ``warn`` takes what the user has to know.
    """

    def __init__(
        self,
        runner: Runner,
        num_steps: int | None,
        position: int,
        timesteps: Tensor | None,
        warn: Callable[[str], None],
    ) -> None:
        self.runner = runner
        self.plan = runner.program.analysis.plan(num_steps)
        self.progress = Progress(len(self.plan.steps), position)
        self.storage = runner.acquire(self.plan, 0 if timesteps is None else len(timesteps))
        self.conditioning = Conditioning(runner, self.storage.hoisted, timesteps, warn)

    def close(self) -> None:
        """Give the storage back; nothing can be run any more."""
        self.conditioning.close()
        self.runner.release(self.storage)

    def run(
        self, decision: Decision, timestep: float | None, inputs: Sequence[Any], branch: str
    ) -> tuple[Any, StepRecord]:
        """Run one step, at ``timestep`` (None: not read); returns the outputs and the record.

        If it raises, the caches count as lost.
        """
        began = time.perf_counter()
        position = decision.position
        step = self.plan.full_step(position) if decision.full else self.plan.steps[position]
        self.progress = replace(self.progress, ambiguous=decision.ambiguous, caches_lost=True)
        compiled = self.runner.program.step(self.plan, step.modes)
        hoisted_flops = self.conditioning.prepare(inputs, position)
        outputs, launch, selection_seconds = self._launch(compiled, step, inputs)
        self.progress = self.progress.advance(timestep)
        seconds = time.perf_counter() - began
        return outputs, StepRecord(
            step.index, step.kind, branch, seconds, selection_seconds, step, hoisted_flops, launch
        )

    def _launch(
        self, compiled: CompiledStep, step: StepPlan, inputs: Sequence[Any]
    ) -> tuple[Any, Launch, float]:
        """Run the ``compiled`` step, as a recording where that is possible.

        Returns the model's outputs, how the step was launched, and the seconds that selecting
        tokens took.
        """
        position = self.progress.position
        selection_seconds = 0.0

        def body(inputs: Sequence[Any]) -> Any:
            """All that the device does in a step; steps of one ``key`` differ in tensors only."""
            nonlocal selection_seconds
            selector, selects = self.storage.selector, time.perf_counter()
            given = selector.select(step) if step.kind != "full" else {}
            selection_seconds = time.perf_counter() - selects
            self.conditioning.bring(inputs, position)
            read = {READ: _SCORES_READ[step.read]}
            outputs = compiled(inputs, {**self.storage.tensors, **given, **read})
            if step.kind == "full":
                selector.full()
            else:
                selector.advance()
            return outputs

        recordings, reason = self.storage.recordings, self.storage.reason
        if recordings is None:
            outputs = body(inputs)
            return outputs, Launch("queued", reason), selection_seconds
        kind = (step.modes, step.read, self.conditioning.listed)
        outputs, reason = recordings.run(kind, (*kind, step.fresh), body, inputs)
        return outputs, Launch("queued" if reason else "recorded", reason), selection_seconds
