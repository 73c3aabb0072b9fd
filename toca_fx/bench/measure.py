"""The run of a case: contestants are built, warmed up, timed, and measured on a GPU."""

from __future__ import annotations

import gc
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from toca_fx.bench.clock import Clock, StepsInTurn, WholeGenerations
from toca_fx.bench.contestants import Call, Contestant, Field, unscored
from toca_fx.bench.gpu import Gpu, Launches, launches_by_kind
from toca_fx.bench.limits import Limits
from toca_fx.bench.result import BenchResult, Measured, Memory, Work, summarize
from toca_fx.policy import Policy
from toca_fx.runtime.context import Run
from toca_fx.runtime.report import least_bytes

if TYPE_CHECKING:
    from toca_fx.examples import Example


def calls_of(example: Example, first: Call, steps: int) -> list[Call]:
    """The calls of a generation, whose latents go smoothly from one noise to another.

    Those of a sampler go from noise to an image like that.
    """
    from toca_fx.examples import vary

    one, other = (
        {name: vary(example, first, end, steps)[name] for name in example.latents}
        for end in (0, steps - 1)
    )

    def between(step: int) -> Any:
        angle = math.pi / 2 * step / max(1, steps - 1)
        return tree_map(lambda a, b: math.cos(angle) * a + math.sin(angle) * b, one, other)

    return [{**vary(example, first, step, steps), **between(step)} for step in range(steps)]


@torch.no_grad()
def run_bench(
    name: str,
    example: Example,
    policy: Policy,
    steps: int,
    rounds: int,
    factory: Mapping[str, Any],
    limits: Limits,
    *,
    images: int = 1,
    mode: str | None = None,
    gpu: Gpu | None = None,
    alternatives: bool = True,
    advance: Callable[[float], None] = lambda share: None,
) -> BenchResult:
    """Time ``rounds`` generations of every contestant, after those that warm up.

    ``factory`` are the keyword arguments ``device`` and ``dtype``, ``gpu`` is the device if it is a
    GPU. ``mode`` is that of ``toca_fx.compile``; ``advance`` is called with the share of the rounds
    done since its last call.
    """
    from toca_fx.examples import build

    model, first = build(example, batch=images * example.batch, **factory)
    calls = calls_of(example, first, steps)
    timesteps = [float(call[example.timestep].flatten()[0]) for call in calls]
    field = Field(model, calls, timesteps, mode)
    wait: Callable[[], None] = (lambda: None) if gpu is None else gpu.synchronize
    plain, ours = field.uncached(), field.toca("toca", policy)
    # Before there are others, which hold memory too.
    memory = _warm_up_and_weigh(plain, ours, calls, gpu)
    others = list[Contestant]()
    if alternatives:
        chooses = any("partial" in record.step.modes for record in ours.run.report().steps)
        others = [field.toca("unscored", unscored(policy))] if chooses else []
        others += field.alternatives(policy)
    recorded = [] if gpu is None else [field.uncached_recorded()]
    failed = {
        other.name: reason
        for other in (*recorded, *others)
        if (reason := _refusal(other, calls, wait))
    }
    uncached = [plain, *(other for other in recorded if other.name not in failed)]
    others = [other for other in others if other.name not in failed]
    clock: Clock = StepsInTurn() if gpu is None else WholeGenerations(gpu)
    timings = clock.time([*uncached, ours, *others], calls, rounds, advance)
    kinds = [record.kind for record in ours.run.report().steps]
    measured = [
        Measured(
            contestant.name,
            timing,
            contestant.compile_seconds,
            contestant.run.report() if isinstance(contestant.run, Run) else None,
            {} if gpu is None or contestant in others else _launches(contestant, calls, kinds, gpu),
        )
        for contestant, timing in zip((*uncached, ours, *others), timings, strict=True)
    ]
    at = len(uncached)
    return summarize(
        name,
        policy.name,
        measured[:at],
        measured[at],
        measured[at + 1 :],
        _work(ours.run),
        limits,
        images=images,
        mode=mode,
        peak_bytes=_peak_bytes() if gpu is None else None,
        memory=memory,
        failed=failed,
    )


def _run(contestant: Contestant, calls: Sequence[Call], wait: Callable[[], None]) -> None:
    """Run a generation that is not timed."""
    with contestant.generation():
        for call in calls:
            contestant.step(call)
        wait()


def _compile(contestant: Contestant, calls: Sequence[Call], wait: Callable[[], None]) -> None:
    """Run the first generation, and note the seconds that compiling took in it."""
    with contestant.generation():
        began = time.perf_counter()
        contestant.step(calls[0])
        wait()
        contestant.compile_seconds = time.perf_counter() - began
        for call in calls[1:]:
            contestant.step(call)
        wait()
    if isinstance(contestant.run, Run):
        report = contestant.run.report()
        seconds = sorted(record.seconds for record in report.steps)
        contestant.compile_seconds = sum(seconds[-report.compiled_graphs :])


def _settle(contestant: Contestant, calls: Sequence[Call], wait: Callable[[], None]) -> None:
    """Run further generations, until the contestant is as fast as it gets."""
    for _ in range(contestant.warm_ups - 1):
        _run(contestant, calls, wait)


def _refusal(contestant: Contestant, calls: Sequence[Call], wait: Callable[[], None]) -> str | None:
    """Warm a contestant up; returns the first line of the error if the model cannot be run so."""
    try:
        _compile(contestant, calls, wait)
        _settle(contestant, calls, wait)
    except Exception as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _warm_up_and_weigh(
    plain: Contestant, ours: Contestant, calls: Sequence[Call], gpu: Gpu | None
) -> Memory | None:
    """Warm both up; returns the memory that a generation takes on a GPU.

    What ours keeps from one generation to the next counts as its own.
    """
    if gpu is None:
        for contestant in (plain, ours):
            _compile(contestant, calls, lambda: None)
            _settle(contestant, calls, lambda: None)
        return None
    _compile(plain, calls, gpu.synchronize)
    gc.collect()
    held = gpu.allocated()
    uncached = gpu.peak(lambda: _run(plain, calls[:1], gpu.synchronize))  # its steps are all alike
    _compile(ours, calls, gpu.synchronize)
    gc.collect()
    # The intermediate values of a recorded step lie in a pool of their own, and are counted only
    # while it is recorded: if the full steps of a small model were recorded in the generation
    # before, theirs are missing here.
    toca = gpu.peak(lambda: _settle(ours, calls, gpu.synchronize))
    return Memory(held, uncached - held, toca - held)


def _launches(
    contestant: Contestant, calls: Sequence[Call], kinds: Sequence[str], gpu: Gpu
) -> Mapping[str, Launches | None]:
    """The launches by kind of step; all steps of an uncached model are of one kind."""
    if isinstance(contestant.run, Run):
        return launches_by_kind(contestant, calls, kinds, gpu)
    return launches_by_kind(contestant, calls[:1], ["uncached"], gpu)


def _work(run: Run) -> Work:
    uncached, steps = least_bytes(run.session.calls)
    return Work(uncached[0], steps)


def _peak_bytes() -> int:
    """The most memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
