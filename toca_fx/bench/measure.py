"""Time a case: contestants take turns step by step, so that all see the same machine.

A machine's speed drifts, and by more than what is to be seen. So every step is compared with the uncached step beside it, and the
median over rounds is that of the share; times are the share of the uncached model's median.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from toca_fx.bench.contestants import Call, Contestant, Field, unscored
from toca_fx.bench.limits import Limits
from toca_fx.policy import Policy

if TYPE_CHECKING:
    from toca_fx.integrations.diffusers import Example
    from toca_fx.program import Program
    from toca_fx.report import Report


_FLUSHED_BYTES = 2**28


@dataclass(frozen=True)
class Kind:
    """Steps that do the same work: median seconds of one, its FLOPs, the bytes that it has to move, and K, the mean of selecting sites."""

    kind: str
    fresh: float
    seconds: float
    flops: int
    bytes: int


@dataclass(frozen=True)
class Alternative:
    """Another way to run the generation; ``flops_ratio`` None: not known."""

    name: str
    latency_ratio: float
    flops_ratio: float | None


@dataclass(frozen=True)
class BenchResult:
    """All times in seconds, all work in FLOPs, per model call unless said otherwise.

    ``uncached`` and ``kinds`` are the step kinds; ``limits`` what the machine can do. ``selection`` and ``scoring`` are what choosing
    tokens costs a partial step, ahead of its graph and in it, ``scoring_full`` what it costs a full one (None: not measured). Ratios are
    of whole generations. Compile times are those of the first calls, with what
    inductor's cache holds by then (tools/compile_times.py: cold ones).
    ``peak_bytes`` is the process's, or the device's. ``failed`` names the alternatives that do not run this model,
    and why.
    """

    case: str
    policy: str
    steps: int
    uncached: Kind
    kinds: tuple[Kind, ...]
    limits: Limits
    selection: float
    scoring: float | None
    scoring_full: float | None
    latency_ratio: float
    flops_ratio: float
    compile_uncached: float
    compile_toca: float
    cache_bytes: int
    hoisted_bytes: int
    peak_bytes: int
    alternatives: tuple[Alternative, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def quotient(self) -> float:
        """Latency ratio over FLOPs ratio: 1 when time falls as much as work does."""
        return self.latency_ratio / self.flops_ratio

    def median(self, kind: str) -> float:
        """Seconds of the median step of a kind."""
        return statistics.median(found.seconds for found in self.kinds if found.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "quotient": self.quotient}


def calls_of(example: Example, first: Call, steps: int) -> list[Call]:
    """The calls of a generation: latents that go smoothly from one noise to another, as those of a sampler do from noise to image."""
    from toca_fx.integrations.diffusers import vary

    one, other = (vary(example, first, end, steps)[example.latent] for end in (0, steps - 1))

    def between(step: int) -> Any:
        angle = math.pi / 2 * step / max(1, steps - 1)
        return tree_map(lambda a, b: math.cos(angle) * a + math.sin(angle) * b, one, other)

    return [{**vary(example, first, step, steps), example.latent: between(step)} for step in range(steps)]


@torch.no_grad()
def run_bench(
    name: str,
    example: Example,
    policy: Policy,
    steps: int,
    rounds: int,
    place: Mapping[str, Any],
    limits: Limits,
    *,
    alternatives: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> BenchResult:
    """Run ``rounds`` generations after one that warms up; ``place`` has device and dtype."""
    from toca_fx.integrations.diffusers import build

    model, first = build(example, **place)
    calls = calls_of(example, first, steps)
    ground = Field(model, calls, [float(call[example.timestep].flatten()[0]) for call in calls])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    uncached, ours = ground.uncached(), ground.toca("toca", policy)
    others = [ground.toca("unscored", unscored(policy)), *ground.alternatives(policy)] if alternatives else []
    failed = {other.name: reason for other in others if (reason := other.refusal(calls[0]))}
    others = [other for other in others if other.name not in failed]
    contestants = [uncached, ours, *others]
    uncached.compile_seconds = uncached.seconds(calls[0])
    flush = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=place["device"])
    rows = [[list[float]() for _ in calls] for _ in contestants]
    for round_index in range(rounds + 1):
        for contestant in contestants:
            contestant.begin()
        for step, call in enumerate(calls):
            for contestant, row in zip(contestants, rows, strict=True):
                # Nobody finds weights in the processor's cache that the one before has read.
                float(flush.zero_()[0])
                seconds = contestant.seconds(call)
                if round_index:
                    row[step].append(seconds)
            on_step()
        for contestant in contestants:
            contestant.end()
        if not round_index:
            report = ours.run.report()
            ours.compile_seconds = sum(sorted(record.seconds for record in report.steps)[-report.compiled_graphs :])
    plain = rows[0]
    usual = statistics.median(chain.from_iterable(plain))
    medians = {contestant.name: _medians(row, plain, usual) for contestant, row in zip(contestants, rows, strict=True)}
    return replace(_result(name, policy, ours, uncached, others, medians, limits), failed=failed)


def _medians(row: Sequence[Sequence[float]], plain: Sequence[Sequence[float]], usual: float) -> list[float]:
    """Per step, the median share of the uncached step beside it, in seconds of the ``usual`` uncached step."""
    return [usual * statistics.median(one / other for one, other in zip(*times, strict=True)) for times in zip(row, plain, strict=True)]


def _result(
    name: str,
    policy: Policy,
    ours: Contestant,
    uncached: Contestant,
    others: Sequence[Contestant],
    medians: Mapping[str, list[float]],
    limits: Limits,
) -> BenchResult:
    report: Report = ours.run.report()
    plain, cached, steps = medians[uncached.name], medians[ours.name], len(report.steps)
    (program,) = {id(program): program for program, _ in ours.run._records}.values()
    kinds = _kinds(report, cached, program)
    unscored_run = next((other.run.report() for other in others if other.name == "unscored"), None)
    plainly = () if unscored_run is None else _kinds(unscored_run, medians["unscored"], None)
    scoring = {kind: max(0.0, _median(kinds, kind) - _median(plainly, kind)) if plainly else None for kind in ("full", "partial")}
    fewer = max(1, round(steps / report.flops_ratio))
    found = [Alternative(f"{fewer} steps instead of {steps}", steps / fewer, steps / fewer)]
    found += [
        Alternative(other.name, sum(plain) / sum(medians[other.name]), _flops_ratio(other)) for other in others if other.name != "unscored"
    ]
    return BenchResult(
        case=name,
        policy=policy.name,
        steps=steps,
        uncached=Kind("uncached", 0, statistics.median(plain), report.flops_uncached // steps, program.uncached_bytes),
        kinds=kinds,
        limits=limits,
        selection=report.selection_seconds / max(1, sum(record.kind != "full" for record in report.steps)),
        scoring=scoring["partial"],
        scoring_full=scoring["full"],
        latency_ratio=sum(plain) / sum(cached),
        flops_ratio=report.flops_ratio,
        compile_uncached=uncached.compile_seconds,
        compile_toca=ours.compile_seconds,
        cache_bytes=report.cache_bytes,
        hoisted_bytes=report.hoisted_bytes,
        peak_bytes=_peak_bytes(),
        alternatives=tuple(found),
    )


def _kinds(report: Report, medians: Sequence[float], program: Program | None) -> tuple[Kind, ...]:
    """The kinds of the steps of a report, by work."""
    times: dict[tuple[str, int], list[float]] = {}
    fresh: dict[tuple[str, int], tuple[float, int]] = {}
    for record, flops, median in zip(report.steps, report.step_flops, medians, strict=True):
        key = (record.kind, flops)
        times.setdefault(key, []).append(median)
        counts = [count for count, mode in zip(record.plan.fresh, record.plan.modes, strict=True) if mode == "partial"]
        nbytes = 0 if program is None else program.step_bytes(len(report.steps), record.plan)
        fresh[key] = (statistics.fmean(counts) if counts else 0.0, nbytes)
    return tuple(
        Kind(kind, fresh[kind, flops][0], statistics.median(found), flops, fresh[kind, flops][1])
        for (kind, flops), found in sorted(times.items())
    )


def _median(kinds: Sequence[Kind], kind: str) -> float:
    return statistics.median(found.seconds for found in kinds if found.kind == kind) if any(k.kind == kind for k in kinds) else 0.0


def _flops_ratio(contestant: Contestant) -> float | None:
    return contestant.run.report().flops_ratio if hasattr(contestant.run, "report") else None


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
