"""``toca-fx bench``: time saved against work saved, beside ``torch.compile(model)`` with fused attention.

Models have the width and the number of tokens of the paper's, as many blocks as a small machine stands, and random weights.
Both sides are compiled by inductor, in one process, and their steps alternate, so that both see the same machine. Reported
are medians over rounds; the first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import toca_fx
from toca_fx.diagnostics import did_you_mean

if TYPE_CHECKING:
    from toca_fx.integrations.diffusers import Example
    from toca_fx.policy import Policy
    from toca_fx.report import Report


@dataclass(frozen=True)
class Case:
    """A preset of ``toca_fx.integrations.diffusers`` with ``config`` changed, and what is run with it."""

    preset: str
    policy: str
    steps: int
    config: Mapping[str, int]


CASES = {
    "dit-xl-2": Case("dit-xl-2-256", "dit-xl-2", 50, {"num_layers": 4}),
    "dit-xl-2-512": Case("dit-xl-2-512", "dit-xl-2", 50, {"num_layers": 2}),
    "pixart-alpha": Case("pixart-alpha-256", "pixart-alpha", 20, {"num_layers": 4}),
    "flux-dev": Case("flux-dev-512", "flux-dev", 12, {"num_layers": 1, "num_single_layers": 1}),
}


@dataclass(frozen=True)
class BenchResult:
    """All times in seconds, per model call unless said otherwise.

    ``kinds`` maps a step kind to its median time; ``partial`` has (share of the uncached FLOPs, median time) for every number of
    fresh tokens; ``full_flops`` and ``uncached_flops`` are those of one call. ``peak_bytes`` is the process's, or the device's.
    """

    case: str
    policy: str
    steps: int
    uncached_step: float
    uncached_flops: int
    full_flops: int
    kinds: dict[str, float]
    partial: list[tuple[float, float]]
    selection_step: float
    latency_ratio: float
    flops_ratio: float
    compile_uncached: float
    compile_toca: float
    cache_bytes: int
    hoisted_bytes: int
    peak_bytes: int

    @property
    def quotient(self) -> float:
        """Latency ratio over FLOPs ratio: 1 when time falls as much as work does."""
        return self.latency_ratio / self.flops_ratio


def example_of(case: Case, blocks: int | None) -> Example:
    """The model of a case, with ``blocks`` of each kind if given."""
    from toca_fx.integrations.diffusers import PRESETS

    example = PRESETS[case.preset]
    return replace(example, config={**example.config, **{key: blocks or number for key, number in case.config.items()}})


@torch.no_grad()
def run_bench(
    name: str,
    example: Example,
    policy: Policy,
    steps: int,
    rounds: int,
    place: Mapping[str, Any],
    on_step: Callable[[], None] = lambda: None,
) -> BenchResult:
    """Alternate uncached and cached steps over ``rounds`` generations after one that warms up; ``place`` has device and dtype."""
    from toca_fx.integrations.diffusers import build, prediction, vary

    model, first = build(example, **place)
    calls = [vary(example, first, step, steps) for step in range(steps)]
    timesteps = [float(call[example.timestep].flatten()[0]) for call in calls]
    uncached: nn.Module = torch.compile(model, fullgraph=True)  # type: ignore[assignment]
    fast = toca_fx.compile(model, policy)

    def seconds(module: nn.Module, step: int) -> float:
        began = time.perf_counter()
        float(prediction(module(**calls[step]))[0].sum())  # waits for the device
        return time.perf_counter() - began

    compile_uncached = seconds(uncached, 0)
    uncached_times: list[list[float]] = [[] for _ in range(steps)]
    cached_times: list[list[float]] = [[] for _ in range(steps)]
    compile_toca = 0.0
    for round_index in range(rounds + 1):
        with toca_fx.session(timesteps=timesteps) as run:
            for step in range(steps):
                plain, cached = seconds(uncached, step), seconds(fast, step)
                if round_index:
                    uncached_times[step].append(plain)
                    cached_times[step].append(cached)
                on_step()
        if not round_index:
            compile_toca = sum(sorted(record.seconds for record in run.report().steps)[-run.report().compiled_graphs :])
    report = run.report()
    plain_medians = [statistics.median(times) for times in uncached_times]
    cached_medians = [statistics.median(times) for times in cached_times]
    return BenchResult(
        case=name,
        policy=policy.name,
        steps=steps,
        uncached_step=statistics.median(plain_medians),
        uncached_flops=report.flops_uncached // steps,
        full_flops=max(report.step_flops),
        kinds={
            kind: statistics.median(t for t, record in zip(cached_medians, report.steps, strict=True) if record.kind == kind)
            for kind in dict.fromkeys(record.kind for record in report.steps)
        },
        partial=_by_work(report, cached_medians, report.flops_uncached / steps),
        selection_step=report.selection_seconds / max(1, sum(record.kind != "full" for record in report.steps)),
        latency_ratio=sum(plain_medians) / sum(cached_medians),
        flops_ratio=report.flops_ratio,
        compile_uncached=compile_uncached,
        compile_toca=compile_toca,
        cache_bytes=report.cache_bytes,
        hoisted_bytes=report.hoisted_bytes,
        peak_bytes=_peak_bytes(),
    )


def _by_work(report: Report, medians: list[float], uncached: float) -> list[tuple[float, float]]:
    times: dict[int, list[float]] = {}
    for record, flops, median in zip(report.steps, report.step_flops, medians, strict=True):
        if record.kind == "partial":
            times.setdefault(flops, []).append(median)
    return [(flops / uncached, statistics.median(found)) for flops, found in sorted(times.items())]


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(result: BenchResult, console: Console) -> None:
    """Print the result as a table."""
    table = Table(title=f"{result.case}, policy {result.policy}, {result.steps} steps", show_header=False)
    table.add_row("uncached step", f"{result.uncached_step * 1e3:.1f} ms")
    for kind, seconds in result.kinds.items():
        table.add_row(f"{kind} step", f"{seconds * 1e3:.1f} ms  ({seconds / result.uncached_step:.3f}x uncached)")
    for share, seconds in (result.partial[:1] + result.partial[-1:]) if len(result.partial) > 1 else []:
        table.add_row(
            f"partial step of {share:.1%} of the work", f"{seconds * 1e3:.1f} ms  ({seconds / result.uncached_step:.3f}x uncached)"
        )
    table.add_row("selection, per partial step", f"{result.selection_step * 1e3:.2f} ms")
    table.add_row("latency ratio", f"{result.latency_ratio:.3f}x")
    table.add_row("FLOPs ratio", f"{result.flops_ratio:.3f}x")
    table.add_row("quotient", f"{result.quotient:.3f}")
    table.add_row("compile time, uncached", f"{result.compile_uncached:.1f} s")
    table.add_row("compile time, all step kinds", f"{result.compile_toca:.1f} s")
    table.add_row("caches", f"{result.cache_bytes / 2**20:.1f} MiB")
    table.add_row("hoisted values", f"{result.hoisted_bytes / 2**20:.1f} MiB")
    table.add_row("peak memory", f"{result.peak_bytes / 2**30:.2f} GiB")
    console.print(table)


def chart(results: list[BenchResult], path: str) -> None:
    """Draw FLOPs against time of each step kind; the line is what the uncached step gets done in the time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.5 * len(results), 4), squeeze=False, layout="constrained")
    for result, ax in zip(results, axes[0], strict=True):
        ax.plot([0, 1.2], [0, 1.2], color="0.7", linewidth=1, label="time falls as work does")
        ax.plot(1, 1, "ko", label="uncached")
        ax.plot(result.full_flops / result.uncached_flops, result.kinds["full"] / result.uncached_step, "s", color="C1", label="full")
        ax.plot(
            [share for share, _ in result.partial],
            [seconds / result.uncached_step for _, seconds in result.partial],
            ".",
            color="C0",
            label="partial",
        )
        ax.set(xlabel="FLOPs, of the uncached step", ylabel="time, of the uncached step", xlim=(0, 1.2), ylim=(0, 1.2))
        ax.set_title(f"{result.case}: {result.latency_ratio:.2f}x time, {result.flops_ratio:.2f}x FLOPs", fontsize=10)
        ax.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: argparse.Namespace) -> int:
    """Run the benchmark as ``args`` say; returns the exit status."""
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        print(f"unknown case `{unknown[0]}`{did_you_mean(unknown[0], CASES)}; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = {"device": device, "dtype": getattr(torch, args.dtype)}
    console, results = Console(), []
    for name in args.cases or ["dit-xl-2"]:
        case = CASES[name]
        policy = toca_fx.load_policy(args.policy or case.policy)
        steps = args.steps or case.steps
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(name, total=(args.rounds + 1) * steps)
            advance = functools.partial(progress.advance, task)
            result = run_bench(name, example_of(case, args.blocks), policy, steps, args.rounds, place, on_step=advance)
        show(result, console)
        results.append(result)
        torch._dynamo.reset()
        gc.collect()
    if args.chart:
        chart(results, args.chart)
    if args.json:
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        machine = {"torch": torch.__version__, "device": name, "threads": args.threads, "dtype": args.dtype, "rounds": args.rounds}
        rows = [{**asdict(result), "quotient": result.quotient} for result in results]
        Path(args.json).write_text(json.dumps({**machine, "results": rows}, indent=2) + "\n", encoding="utf-8")
    return 0
