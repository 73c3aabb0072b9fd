"""``toca-fx bench``: measure, print, write and draw.

Models have the width and the number of tokens of the paper's, as many blocks as a small machine
stands (or all), and random weights. All contestants are compiled by inductor, in one process, and
take turns (see ``clock``), so that all see the same machine. Medians over rounds are reported;
generations that warm up do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from toca_fx.bench.cases import CASES, example_of
from toca_fx.bench.gpu import Cuda, Gpu
from toca_fx.bench.limits import measure_limits
from toca_fx.bench.measure import run_bench
from toca_fx.bench.result import BenchResult
from toca_fx.bench.show import chart, show
from toca_fx.diagnostics import did_you_mean
from toca_fx.lower.compiler import Inner
from toca_fx.policy import load_policy


def main(args: argparse.Namespace) -> int:
    """Run the benchmark as ``args`` say; returns the exit status."""
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        hint = did_you_mean(unknown[0], CASES)
        known = ", ".join(CASES)
        print(f"unknown case `{unknown[0]}`{hint}; there are {known}", file=sys.stderr)
        return 2
    try:
        Inner("inductor", args.mode)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    # The hooks of diffusers make every block a function of its own.
    torch.compiler.config.recompile_limit = 64
    gpu = find_gpu()
    dtype = args.dtype or ("float32" if gpu is None else "bfloat16")
    factory = {"device": "cpu" if gpu is None else gpu.kind, "dtype": getattr(torch, dtype)}
    limits = measure_limits(factory, gpu)
    machine = {**machine_facts(gpu), "threads": args.threads, "dtype": dtype, "rounds": args.rounds}
    console, results = Console(), list[BenchResult]()
    console.print(
        ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
    )
    linear, copied = f"{limits.flops / 1e9:.0f} GFLOP/s", f"{limits.bytes / 1e9:.1f} GB/s"
    console.print(f"a linear layer gets {linear}, a copy {copied}")
    for case_name in args.cases or ["dit-xl-2"]:
        case = CASES[case_name]
        # The bar is drawn between timed steps, not by a thread at the same time.
        with Progress(console=console, transient=True, auto_refresh=False) as progress:
            result = run_bench(
                case_name,
                example_of(case, args.blocks),
                load_policy(args.policy or case.policy),
                args.steps or case.steps,
                args.rounds,
                factory,
                limits,
                images=args.images,
                mode=args.mode,
                gpu=gpu,
                alternatives=not args.alone,
                advance=_advance(progress, case_name),
            )
        show(result, console)
        results.append(result)
        torch.compiler.reset()
        gc.collect()
    if args.json:
        figures = {
            **machine,
            "limits": asdict(limits),
            "results": [result.to_dict() for result in results],
        }
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.chart:
        chart(results, args.chart)
    return 0


def find_gpu() -> Gpu | None:
    """The GPU of this machine, if it has one."""
    return Cuda() if torch.cuda.is_available() else None


def machine_facts(gpu: Gpu | None) -> dict[str, Any]:
    """What figures depend on, and when they were taken.

    It is the GPU with its driver and CUDA runtime if there is one, or else the processor.
    """
    found = {"device": platform.processor() or platform.machine()} if gpu is None else gpu.facts()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        **found,
    }


def _advance(progress: Progress, name: str) -> Callable[[float], None]:
    task = progress.add_task(name, total=1.0)

    def advance(share: float) -> None:
        progress.advance(task, share)
        progress.refresh()

    return advance
