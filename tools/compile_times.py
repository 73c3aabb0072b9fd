"""Time first calls: torch.compile of the whole model, of its blocks, and all kinds of our steps.

    python tools/compile_times.py [MODEL ...]      # default: all

Every measurement is a process of its own; "cold" has an empty cache folder, "warm" that of the cold
one. Times are seconds on the clock, and include the first run of each graph; "kinds" is the number
of kinds of step that were compiled. "ratio" is against torch.compile of the whole model.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # runs from a clone that is not installed

import toca_fx
from toca_fx.bench.cases import CASES, example_of
from toca_fx.bench.measure import calls_of
from toca_fx.examples import build

THREADS = 2
WHOLE, BLOCKS, OURS = "torch.compile", "compile_repeated_blocks", "toca_fx"

# All blocks; of FLUX.1-dev with a sixth of the heads, which a small machine stands.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "dit-xl-2": ("dit-xl-2", {}),
    "pixart-alpha": ("pixart-alpha", {}),
    "flux-like": ("flux-dev", {"num_attention_heads": 4}),
}


@torch.no_grad()
def measure(what: str, name: str) -> list[float]:
    """Compile in this process; the seconds of every first call."""
    torch.set_num_threads(THREADS)
    case_name, changed = MODELS[name]
    case = CASES[case_name]
    example = example_of(case, "all")
    example = replace(example, config={**example.config, **changed})
    model, first = build(example)
    model(**first)  # whatever else is done at a first call
    if what == WHOLE:
        return [_seconds(lambda: torch.compile(model, fullgraph=True)(**first))]
    if what == BLOCKS:
        if not getattr(model, "_repeated_blocks", None):
            return []  # diffusers does not say which these are
        model.compile_repeated_blocks(fullgraph=True)
        return [_seconds(lambda: model(**first))]
    fast, found = toca_fx.compile(model, case.policy), []
    calls = calls_of(example, first, case.steps)
    timesteps = [float(call[example.timestep][0]) for call in calls]
    kinds: dict[str, None] = {}
    with toca_fx.session(timesteps=timesteps) as run:
        for call in calls:
            seconds = _seconds(lambda call=call: fast(**call))
            kind = run.report().steps[-1].kind
            if kind not in kinds:
                kinds[kind] = None
                found.append(seconds)
            if len(kinds) == 2:
                break
        run.close()  # otherwise a warning would say that steps are missing
    return found


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _in_a_process(what: str, name: str, cache: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, __file__, name, "--measure", what],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        check=True,
        capture_output=True,
        text=True,
    )
    seconds: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds


def main() -> None:
    """Run all measurements and print them as a table."""
    parser = argparse.ArgumentParser(description="Time first calls.")
    parser.add_argument("cases", nargs="*", metavar="MODEL", default=list(MODELS))
    parser.add_argument("--measure", choices=(WHOLE, BLOCKS, OURS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.cases[0])))
        return
    table = Table("model", "what", "kinds", "cold", "ratio", "warm", "ratio")
    for name in arguments.cases:
        whole: list[float] = []
        for what in (WHOLE, BLOCKS, OURS):
            with tempfile.TemporaryDirectory() as cache:
                cold, warm = (_in_a_process(what, name, cache) for _ in range(2))
            if not cold:
                table.add_row(name, what, "not offered")
                continue
            whole = whole or [sum(cold), sum(warm)]
            totals = zip((sum(cold), sum(warm)), whole, strict=True)
            cells = [cell for ours, its in totals for cell in (f"{ours:.1f}", f"{ours / its:.2f}")]
            table.add_row(name, what, str(len(cold)), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
