"""The parts of the benchmark: the clock on a made-up device, sums, launches, limits and cases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.made_up_gpu import MadeUpGpu
from toca_fx import cli
from toca_fx import examples as integration
from toca_fx.bench import clock as clock_module
from toca_fx.bench import limits as limits_module
from toca_fx.bench.cases import CASES, example_of
from toca_fx.bench.clock import Taken, Timing, WholeGenerations, medians, paired
from toca_fx.bench.contestants import fora
from toca_fx.bench.gpu import Cuda, Launches, Traced, launches, launches_by_kind
from toca_fx.bench.limits import Limits, measure_limits
from toca_fx.bench.result import BenchResult, Measured, Work, summarize
from toca_fx.bench.show import show
from toca_fx.examples import PRESETS, examples
from toca_fx.plan.plan import StepPlan
from toca_fx.policy import Forecast, load_policy, shipped_policies
from toca_fx.runtime.report import Launch, Report, StepRecord


class Simulated:
    """A host that asks for work in 1 s, and a device that takes longer over it; no time goes by but
    theirs.
    """

    def __init__(self, work: float) -> None:
        self.work, self.now, self.busy_until = work, 0.0, 0.0
        self.log: list[str] = []

    @contextmanager
    def generation(self) -> Iterator[None]:
        self.log.append("open")
        yield
        self.log.append("close")

    def step(self, call: int) -> None:
        self.log.append(f"step {call}")
        self.now += 1
        self.busy_until = max(self.now, self.busy_until) + self.work

    def event(self) -> SimulatedEvent:
        return SimulatedEvent(self)

    def synchronize(self) -> None:
        self.log.append("wait")
        self.now = max(self.now, self.busy_until)


class SimulatedEvent:
    def __init__(self, device: Simulated) -> None:
        self.device = device

    def record(self) -> None:
        self.at = max(self.device.now, self.device.busy_until)

    def elapsed_time(self, end_event: SimulatedEvent) -> float:
        return (end_event.at - self.at) * 1e3


def test_nothing_waits_inside_a_generation_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Simulated(work=5.0)
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: device.now)
    shares: list[float] = []
    first, second = WholeGenerations(device).time([device, device], [0, 1, 2], 2, shares.append)
    monkeypatch.undo()
    assert device.log == ["open", "wait", "step 0", "step 1", "step 2", "wait", "close"] * 4
    # The device starts when it has been asked for the first time, and is then always asked before
    # it is done.
    assert first == second == Timing((6.0, 5.0, 5.0), (1.0, 1.0, 1.0), 16.0, (16.0, 16.0))
    assert shares == [0.25] * 4


def test_medians_are_taken_step_by_step_and_of_whole_generations() -> None:
    taken = [
        Taken([1.0, 5.0], [0.1, 0.3], 6.0),
        Taken([3.0, 4.0], [0.2, 0.1], 9.0),
        Taken([2.0, 9.0], [0.9, 0.2], 7.0),
    ]
    assert medians(taken) == Timing((2.0, 5.0), (0.2, 0.2), 7.0, (6.0, 9.0, 7.0))


def test_on_a_cpu_each_step_is_compared_with_the_uncached_one_beside_it() -> None:
    plain = [[2.0, 4.0, 8.0], [2.0, 4.0, 4.0]]  # by step and round: the machine slows down
    ours = [[1.0, 2.0, 4.0], [0.5, 1.0, 1.0]]
    uncached, cached = paired([plain, ours])
    assert uncached == Timing((4.0, 4.0), (4.0, 4.0), 8.0, (4.0, 8.0, 12.0))
    assert cached == Timing((2.0, 1.0), (2.0, 1.0), 3.0, (1.5, 3.0, 5.0))


def _steady(seconds: Sequence[float], host: float) -> Timing:
    return Timing(tuple(seconds), (host,) * len(seconds), sum(seconds), (sum(seconds),))


def _summary(slow: float, fast: float) -> BenchResult:
    """Three steps, a full one and two partial ones of a tenth of the work, beside two uncached
    models.
    """

    def record(index: int, kind: str, fresh: int) -> StepRecord:
        whole: Any = SimpleNamespace(sites=())
        plan: Any = SimpleNamespace(
            fresh=(fresh, 9), modes=("partial" if kind == "partial" else "full", "reuse")
        )
        launch = Launch("recorded", "") if kind == "partial" else Launch("queued", "too large")
        return StepRecord(index, kind, "", 1.0, 0.25, plan, whole, 0, launch)

    steps = (record(0, "full", 100), record(1, "partial", 7), record(2, "partial", 7))
    report = Report(steps, (), (1000, 100, 100), 3000, 0, 0, 2, ())
    counted = {"full": Launches(3, 0, 3), "partial": Launches(0, 1, 9)}
    ours = Measured("toca", _steady((6.0, 1.0, 2.0), 0.5), 4.0, report, counted)
    uncached = [
        Measured("queued", _steady((slow,) * 3, 3.0), 2.0),
        Measured("recorded", _steady((fast,) * 3, 0.1), 3.0),
    ]
    other = Measured("another cache", _steady((5.0,) * 3, 1.0))
    return summarize(
        "case", "policy", uncached, ours, [other], Work(50, (40, 20, 20)), Limits(1.0, 1.0)
    )


@pytest.mark.parametrize(("slow", "fast", "named"), [(9.0, 6.0, "recorded"), (6.0, 9.0, "queued")])
def test_the_quotient_is_taken_against_the_faster_baseline(
    slow: float, fast: float, named: str
) -> None:
    result = _summary(slow, fast)
    assert (result.baseline, result.uncached.seconds, result.latency_ratio) == (named, 6.0, 2.0)
    assert result.quotient == pytest.approx(2.0 / 2.5)
    assert result.ratios == {"full": 1.0, "partial": 0.25}
    full, partial = result.kinds
    assert (full.host, full.fresh, full.bytes, str(full.launches)) == (0.5, 0.0, 40, "3 kernels")
    assert (partial.seconds, partial.fresh, partial.bytes, str(partial.launches)) == (
        1.5,
        7.0,
        20,
        "1 graph",
    )
    assert result.alternatives[1].latency_ratio == pytest.approx(18 / 15)
    figures = json.loads(json.dumps(result.to_dict()))
    assert figures["timings"]["toca"] == {
        "device_ms": [6000.0, 1000.0, 2000.0],
        "host_ms": [500.0] * 3,
        "generation_s": 9.0,
        "rounds_s": [9.0],
    }
    assert (figures["quotient"], figures["ratios"]["partial"]) == (pytest.approx(0.8), 0.25)
    assert figures["recordings"] == {"full": {"queued: too large": 1}, "partial": {"recorded": 2}}


def test_steps_that_run_no_block_choose_nothing() -> None:
    """What a choice costs is a matter of the steps that choose: here of half of a second."""

    def record(index: int, modes: tuple[str, ...], seconds: float) -> StepRecord:
        step = StepPlan(index, modes, (8 * (modes[0] == "full"), 64), whole=1)
        plan: Any = SimpleNamespace(sites=())
        return StepRecord(index, step.kind, "", 1.0, seconds, step, plan, 0)

    steps = (
        record(0, ("full", "full"), 0.0),
        record(1, ("partial", "full"), 0.5),
        record(2, ("skip", "reuse"), 0.0),
        record(3, ("skip", "reuse"), 0.0),
    )
    report = Report(steps, (), (1000, 400, 2, 2), 4000, 0, 0, 3, ())
    ours = Measured("toca", _steady((6.0, 3.0, 0.1, 0.2), 0.5), 4.0, report)
    uncached = [Measured("queued", _steady((6.0,) * 4, 3.0), 2.0)]
    work = Work(50, (40, 20, 6, 6))
    result = summarize("case", "policy", uncached, ours, [], work, Limits(1.0, 1.0))
    assert [(kind.kind, kind.count) for kind in result.kinds] == [
        ("full", 1),
        ("partial", 1),
        ("skip", 2),
    ]
    assert result.ratios["skip"] == pytest.approx(0.15 / 6)
    assert (result.selection, result.scoring) == (0.5, None)
    console = Console(record=True, width=200)
    show(result, console)
    (line,) = (line for line in console.export_text().splitlines() if "skip" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")][:2] == ["skip", "none"]


@pytest.mark.parametrize(
    ("policy", "interval"), [("reference/toca-dit-xl-2", 3), ("digits", 3), ("dit-xl-2", 3)]
)
def test_fora_has_about_as_many_full_steps(policy: str, interval: int) -> None:
    reused = fora(load_policy(policy))
    assert (reused.N.base, reused.N.full_steps) == (interval, None)
    assert (reused.cache.grain, reused.gate, reused.skip) == ("module", None, "none")
    assert reused.forecast == Forecast()


def test_launches_are_counted_by_what_the_host_called() -> None:
    on_host = (
        "cudaLaunchKernel",
        "cuLaunchKernelEx",
        "cudaLaunchKernelExC_v11060",
        "cudaGraphLaunch",
        "cudaMemcpyAsync",
        "aten::mm",
    )
    on_device = (
        "triton_poi_fused_0",
        "sm90_xmma_gemm",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
    )
    seen = [*(Traced(name, False) for name in on_host), *(Traced(name, True) for name in on_device)]
    assert launches(seen) == Launches(kernels=3, graphs=1, ran=2)
    assert launches(event for event in seen if not event.on_device) is None


def test_launches_are_counted_in_the_middle_step_of_each_kind() -> None:
    device, traced = Simulated(1.0), MadeUpGpu()
    seen: list[str] = []

    def trace(work: Callable[[], None]) -> Iterable[Traced]:
        work()
        seen.append(device.log[-1])
        return [Traced("cudaGraphLaunch", False), Traced("k", True)]

    traced.traced = trace  # type: ignore[method-assign]
    counted = launches_by_kind(
        device, range(5), ["full", "full", "partial", "partial", "partial"], traced
    )
    assert seen == ["step 1", "step 3"]
    assert counted == {"full": Launches(0, 1, 1), "partial": Launches(0, 1, 1)}
    assert [entry for entry in device.log if entry.startswith("step")] == [
        f"step {at}" for at in range(5)
    ]


def test_the_profiler_names_what_the_host_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seen = Cuda().traced(lambda: torch.ones(2).add_(1))
    assert Traced("aten::add_", False) in seen
    assert launches(seen) is None


def test_limits_are_measured_by_events_where_a_device_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits_module, "_GPU_ROWS", 8)
    monkeypatch.setattr(limits_module, "_GPU_WIDTH", 4)
    device = Simulated(work=0.0)
    made = device.event

    def a_second_later() -> SimulatedEvent:
        event = made()
        monkeypatch.setattr(event, "record", lambda: (device.step(0), SimulatedEvent.record(event)))
        return event

    monkeypatch.setattr(device, "event", a_second_later)
    limits = measure_limits({"device": "cpu", "dtype": torch.float32}, device)
    assert limits == Limits(flops=2 * 8 * 4 * 16, bytes=2 * 2**28)
    assert device.log.count("wait") == 2


def test_every_case_has_its_preset_and_its_policy() -> None:
    for case in CASES.values():
        assert case.policy in shipped_policies()
        assert case.config.keys() <= PRESETS[case.preset].config.keys()
        assert example_of(case, 3).config["num_layers"] == 3
        assert example_of(case, None).config["num_layers"] == case.config["num_layers"]
        assert example_of(case, "all") is PRESETS[case.preset]


@pytest.mark.parametrize(
    "device", ["cpu", "meta"]
)  # "meta" has no values to read, as a GPU has none for numpy
def test_every_model_can_be_made_in_place_in_half_precision(device: str) -> None:
    for example in examples().values():
        with torch.device(device):
            model = integration._construct(example, torch.bfloat16)
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        assert torch.get_default_dtype() == torch.float32


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "sdxl"]) == 2
    assert (
        "unknown case `sdxl`; there are dit-xl-2, dit-xl-2-512, pixart-alpha, pixart-alpha-1024, "
        "latte, flux-dev, flux-dev-1024, flux-768, wan-1.3b"
    ) in capsys.readouterr().err


def test_an_unknown_mode_or_number_of_blocks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--mode", "reduce-overhed"]) == 2
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "--blocks", "al"])
    assert "al" in capsys.readouterr().err
