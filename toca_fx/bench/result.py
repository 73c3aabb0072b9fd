"""The result of a case as data, made from timings and reports; nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from toca_fx.bench.clock import Timing
from toca_fx.bench.gpu import Launches
from toca_fx.bench.limits import Limits

if TYPE_CHECKING:
    from toca_fx.runtime.report import Report


@dataclass(frozen=True)
class Kind:
    """Steps that do the same work.

    ``seconds`` is the median of one on the device, ``host`` how long the call kept the host (on a
    CPU that is the step), ``bytes`` what it has to move, ``fresh`` the mean K of the sites that
    select. ``launches`` is None if there are none to count; ``count`` is how many such steps a
    generation has.
    """

    kind: str
    fresh: float
    seconds: float
    host: float
    flops: int
    bytes: int
    launches: Launches | None = None
    count: int = 1


@dataclass(frozen=True)
class Baseline:
    """A way to run the uncached model: seconds of a generation and the first call, and a step."""

    name: str
    generation: float
    step: Kind
    compile_seconds: float


@dataclass(frozen=True)
class Alternative:
    """Another way to run the generation; ``flops_ratio`` is None if it is not known."""

    name: str
    latency_ratio: float
    flops_ratio: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU: held before a generation, and above that at its peak, uncached and ours.

    Weights and inputs are held before.
    """

    held: int
    uncached: int
    toca: int


@dataclass(frozen=True)
class Measured:
    """The figures of one contestant.

    ``report`` is that of its session, if it has one; ``launches`` are by kind of step.
    """

    name: str
    timing: Timing
    compile_seconds: float = 0.0
    report: Report | None = None
    launches: Mapping[str, Launches | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """Bytes to be moved at least: by one uncached step, and by each of our steps."""

    uncached: int
    steps: Sequence[int]


@dataclass(frozen=True)
class BenchResult:
    """The result of a case: times in seconds and work in FLOPs, per model call if not said else.

    ``images`` are those of a run, ``mode`` that of ``toca_fx.compile``. ``baseline`` names the
    fastest of the ``baselines``, against which everything is compared. ``generation`` is the time
    of one of ours, ``kinds`` are our step kinds, ``limits`` what the machine can do. ``selection``
    and ``scoring`` are what choosing tokens costs a partial step, ahead of its graph (on the host;
    a recorded step has it inside) and in it, ``scoring_full`` what it costs a full one (None: not
    measured). ``recordings`` are by kind how many steps were recorded, and how many queued for
    which reason (empty on a CPU). Compile times are those of the first calls, with what inductor's
    cache holds by then (tools/compile_times.py: cold ones). ``peak_bytes`` is the process's on a
    CPU, ``memory`` the device's on a GPU. ``timings`` are those of every contestant, ``failed``
    names those that do not run this model, and why.
    """

    case: str
    policy: str
    steps: int
    images: int
    mode: str | None
    baseline: str
    baselines: tuple[Baseline, ...]
    generation: float
    kinds: tuple[Kind, ...]
    limits: Limits
    selection: float
    scoring: float | None
    scoring_full: float | None
    recordings: Mapping[str, Mapping[str, int]]
    flops_ratio: float
    compile_toca: float
    cache_bytes: int
    hoisted_bytes: int
    peak_bytes: int | None
    memory: Memory | None
    alternatives: tuple[Alternative, ...]
    timings: Mapping[str, Timing]
    failed: Mapping[str, str]

    @property
    def fastest(self) -> Baseline:
        """The baseline that everything is compared with."""
        return next(found for found in self.baselines if found.name == self.baseline)

    @property
    def uncached(self) -> Kind:
        """The step of that baseline."""
        return self.fastest.step

    @property
    def latency_ratio(self) -> float:
        """Time of the uncached generation over time of ours."""
        return self.fastest.generation / self.generation

    @property
    def quotient(self) -> float:
        """Latency ratio over FLOPs ratio: 1 when time falls as much as work does."""
        return self.latency_ratio / self.flops_ratio

    @property
    def ratios(self) -> dict[str, float]:
        """By kind of step: its time on the device over that of an uncached step."""
        return {
            name: seconds_of(self.kinds, name) / self.uncached.seconds
            for name in dict.fromkeys(kind.kind for kind in self.kinds)
        }

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        figures = {
            **asdict(self),
            "timings": {name: _milliseconds(timing) for name, timing in self.timings.items()},
        }
        derived = {
            "latency_ratio": self.latency_ratio,
            "quotient": self.quotient,
            "ratios": self.ratios,
        }
        return {**figures, "uncached": asdict(self.uncached), **derived}


def _milliseconds(timing: Timing) -> dict[str, Any]:
    """A timing as JSON-ready data: steps in milliseconds, generations in seconds."""
    steps = {"device_ms": timing.device, "host_ms": timing.host}
    return {
        **{name: [round(seconds * 1e3, 4) for seconds in found] for name, found in steps.items()},
        "generation_s": timing.generation,
        "rounds_s": timing.rounds,
    }


def summarize(
    case: str,
    policy: str,
    uncached: Sequence[Measured],
    ours: Measured,
    others: Sequence[Measured],
    work: Work,
    limits: Limits,
    *,
    images: int = 1,
    mode: str | None = None,
    peak_bytes: int | None = None,
    memory: Memory | None = None,
    failed: Mapping[str, str] | None = None,
) -> BenchResult:
    """The result of a case.

    ``uncached`` are the baselines, ``others`` our variants and other caches.
    """
    report = _report(ours)
    steps = len(report.steps)
    baselines = tuple(
        _baseline(found, report.flops_uncached // steps, work.uncached) for found in uncached
    )
    fastest = min(baselines, key=lambda found: found.generation)
    kinds = kinds_of(report, ours.timing, work.steps, ours.launches)
    unscored = next((other for other in others if other.name == "unscored"), None)
    plainly = () if unscored is None else kinds_of(_report(unscored), unscored.timing, [0] * steps)
    scoring = {
        kind: max(0.0, seconds_of(kinds, kind) - seconds_of(plainly, kind)) if plainly else None
        for kind in ("full", "partial")
    }
    fewer = max(1, round(steps / report.flops_ratio))
    found = [Alternative(f"{fewer} steps instead of {steps}", steps / fewer, steps / fewer)]
    found += [
        Alternative(
            other.name,
            fastest.generation / other.timing.generation,
            None if other.report is None else other.report.flops_ratio,
        )
        for other in others
        if other is not unscored
    ]
    return BenchResult(
        case=case,
        policy=policy,
        steps=steps,
        images=images,
        mode=mode,
        baseline=fastest.name,
        baselines=baselines,
        generation=ours.timing.generation,
        kinds=kinds,
        limits=limits,
        selection=report.selection_seconds
        / max(1, sum("partial" in record.step.modes for record in report.steps)),
        scoring=scoring["partial"],
        scoring_full=scoring["full"],
        recordings=report.launches,
        flops_ratio=report.flops_ratio,
        compile_toca=ours.compile_seconds,
        cache_bytes=report.cache_bytes,
        hoisted_bytes=report.hoisted_bytes,
        peak_bytes=peak_bytes,
        memory=memory,
        alternatives=tuple(found),
        timings={found.name: found.timing for found in (*uncached, ours, *others)},
        failed=failed or {},
    )


def _report(measured: Measured) -> Report:
    assert measured.report is not None, f"{measured.name} ran without a session"
    return measured.report


def _baseline(measured: Measured, flops: int, nbytes: int) -> Baseline:
    timing = measured.timing
    seconds, host = statistics.median(timing.device), statistics.median(timing.host)
    step = Kind("uncached", 0, seconds, host, flops, nbytes, measured.launches.get("uncached"))
    return Baseline(measured.name, timing.generation, step, measured.compile_seconds)


def kinds_of(
    report: Report,
    timing: Timing,
    moved: Sequence[int],
    launches: Mapping[str, Launches | None] | None = None,
) -> tuple[Kind, ...]:
    """The kinds of the steps of a report, by work; ``moved`` are the bytes of every step."""
    calls: dict[tuple[str, int], list[int]] = {}
    for at, (record, flops) in enumerate(zip(report.steps, report.step_flops, strict=True)):
        calls.setdefault((record.kind, flops), []).append(at)
    return tuple(
        Kind(
            kind,
            _fresh(report, steps[-1]),
            statistics.median(timing.device[at] for at in steps),
            statistics.median(timing.host[at] for at in steps),
            flops,
            moved[steps[-1]],
            (launches or {}).get(kind),
            len(steps),
        )
        for (kind, flops), steps in sorted(calls.items())
    )


def _fresh(report: Report, at: int) -> float:
    """The mean number of tokens that the selecting sites of a step compute."""
    step = report.steps[at].step
    sites = zip(step.fresh, step.modes, strict=True)
    counts = [count for count, mode in sites if mode == "partial"]
    return statistics.fmean(counts) if counts else 0.0


def seconds_of(kinds: Sequence[Kind], name: str) -> float:
    """Seconds of the median step of a kind; 0 if there is none."""
    found: list[float] = []
    for kind in kinds:
        found += [kind.seconds] * kind.count if kind.kind == name else []
    return statistics.median(found) if found else 0.0
