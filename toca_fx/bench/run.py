"""``toca-fx bench``: measure, print, write and draw.

Models have the width and the number of tokens of the paper's, as many blocks as a small machine stands, and random weights.
All contestants are compiled by inductor, in one process, and their steps alternate, so that all see the same machine. Reported
are medians over rounds; the first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import toca_fx
from toca_fx.bench.cases import CASES, example_of
from toca_fx.bench.limits import measure_limits
from toca_fx.bench.measure import BenchResult, Kind, run_bench
from toca_fx.diagnostics import did_you_mean


def main(args: argparse.Namespace) -> int:
    """Run the benchmark as ``args`` say; returns the exit status."""
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        print(f"unknown case `{unknown[0]}`{did_you_mean(unknown[0], CASES)}; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # the hooks of diffusers make every block a function of its own
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = {"device": device, "dtype": getattr(torch, args.dtype)}
    limits = measure_limits(place)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    machine = {"torch": torch.__version__, "device": name, "threads": args.threads, "dtype": args.dtype, "rounds": args.rounds}
    console, results = Console(), list[BenchResult]()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    console.print(f"a linear layer gets {limits.flops / 1e9:.0f} GFLOP/s, a copy {limits.bytes / 1e9:.1f} GB/s")
    for case_name in args.cases or ["dit-xl-2"]:
        case = CASES[case_name]
        policy = toca_fx.load_policy(args.policy or case.policy)
        steps = args.steps or case.steps
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(case_name, total=(args.rounds + 1) * steps)
            result = run_bench(
                case_name,
                example_of(case, args.blocks),
                policy,
                steps,
                args.rounds,
                place,
                limits,
                alternatives=not args.alone,
                on_step=functools.partial(progress.advance, task),
            )
        show(result, console)
        results.append(result)
        torch._dynamo.reset()
        gc.collect()
    if args.json:
        figures = {**machine, "limits": asdict(limits), "results": [result.to_dict() for result in results]}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.chart:
        chart(results, args.chart)
    return 0


def show(result: BenchResult, console: Console) -> None:
    """Print the result as tables."""
    table = Table(title=f"{result.case}, policy {result.policy}, {result.steps} steps")
    for column in ("step", "fresh tokens", "time", "of uncached", "FLOPs of uncached", "least time by roofline"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for kind in (result.uncached, *_shown(result.kinds)):
        least = result.limits.seconds(kind.flops, kind.bytes)
        share, work = kind.seconds / result.uncached.seconds, kind.flops / result.uncached.flops
        fresh = f"{kind.fresh:.1f}" if kind.kind not in ("uncached", "full") else "all"
        table.add_row(kind.kind, fresh, f"{kind.seconds * 1e3:.1f} ms", f"{share:.3f}", f"{work:.3f}", f"{least / kind.seconds:.0%}")
    console.print(table)
    figures = Table(show_header=False)
    figures.add_row("latency ratio", f"{result.latency_ratio:.3f}x")
    figures.add_row("FLOPs ratio", f"{result.flops_ratio:.3f}x")
    figures.add_row("quotient", f"{result.quotient:.3f}")
    partial = result.median("partial") if any(kind.kind == "partial" for kind in result.kinds) else float("nan")
    figures.add_row("choosing tokens ahead of a partial step", f"{result.selection * 1e3:.2f} ms ({result.selection / partial:.1%})")
    if result.scoring is not None and result.scoring_full is not None:
        figures.add_row("scoring tokens in a partial step", f"{result.scoring * 1e3:.2f} ms ({result.scoring / partial:.1%})")
        share = result.scoring_full / result.median("full")
        figures.add_row("scoring tokens in a full step", f"{result.scoring_full * 1e3:.2f} ms ({share:.1%})")
    figures.add_row("first calls, torch.compile", f"{result.compile_uncached:.1f} s")
    figures.add_row("first calls, all step kinds", f"{result.compile_toca:.1f} s")
    figures.add_row("caches", f"{result.cache_bytes / 2**20:.1f} MiB")
    figures.add_row("hoisted values", f"{result.hoisted_bytes / 2**20:.1f} MiB")
    figures.add_row("peak memory", f"{result.peak_bytes / 2**30:.2f} GiB")
    for other in result.alternatives:
        fewer = "" if other.flops_ratio is None else f" for {other.flops_ratio:.3f}x fewer FLOPs"
        figures.add_row(f"instead: {other.name}", f"{other.latency_ratio:.3f}x{fewer}")
    for name, reason in result.failed.items():
        figures.add_row(f"instead: {name}", f"does not run: {reason}")
    console.print(figures)


def _shown(kinds: Sequence[Kind]) -> list[Kind]:
    """Of many partial steps, the least, the middle and the most work."""
    shown: list[Kind] = []
    for name in dict.fromkeys(kind.kind for kind in kinds):
        same = [kind for kind in kinds if kind.kind == name]
        shown += [same[at] for at in sorted({0, len(same) // 2, len(same) - 1})]
    return shown


def chart(results: Sequence[BenchResult], path: str) -> None:
    """Draw FLOPs against time of each step kind, with what the uncached step gets done in the time, and what the machine could."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4.2), squeeze=False, layout="constrained")
    for result, ax in zip(results, axes[0], strict=True):
        full = result.uncached
        ax.plot([0, 1.2], [0, 1.2 * full.seconds * 1e3], color="0.7", linewidth=1, label="time falls as work does")
        every = (full, *result.kinds)
        limit = sorted((kind.flops / full.flops, result.limits.seconds(kind.flops, kind.bytes) * 1e3) for kind in every)
        ax.plot(*zip(*limit, strict=True), color="C3", linewidth=1, linestyle=":", label="roofline: compute or bandwidth")
        ax.plot(1, full.seconds * 1e3, "ko", label="torch.compile")
        for at, name in enumerate(dict.fromkeys(kind.kind for kind in result.kinds)):
            same = [kind for kind in result.kinds if kind.kind == name]
            ax.plot(
                [kind.flops / full.flops for kind in same], [kind.seconds * 1e3 for kind in same], "os."[at % 3], color=f"C{at}", label=name
            )
        ax.set(xlabel="FLOPs, of the uncached step", ylabel="time of a step (ms)", xlim=(0, 1.15), ylim=(0, None))
        ax.set_title(f"{result.case}: {result.latency_ratio:.2f}x time, {result.flops_ratio:.2f}x FLOPs", fontsize=10)
        ax.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
