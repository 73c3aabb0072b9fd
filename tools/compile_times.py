"""Time the compilation of DiT-XL/2 with all 28 blocks.

    python tools/compile_times.py

Timed are torch.compile, and full and partial steps; cold, and from inductor's cache. Every
measurement is a process of its own; "cold" has an empty cache folder, "warm" that of the cold one.
Times include the first run of each graph.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # runs from a clone that is not installed

import toca_fx
from toca_fx.bench.cases import CASES, example_of
from toca_fx.bench.measure import calls_of
from toca_fx.examples import build

THREADS = 2


@torch.no_grad()
def measure(what: str) -> None:
    """Compile in this process and print the seconds of every first call."""
    torch.set_num_threads(THREADS)
    case = CASES["dit-xl-2"]
    example = example_of(case, 28)
    model, first = build(example)
    calls = calls_of(example, first, case.steps)
    if what == "torch.compile":
        run = torch.compile(model, fullgraph=True)
        began = time.perf_counter()
        run(**first)
        print(f"{time.perf_counter() - began:.1f} s")
        return
    fast = toca_fx.compile(model, case.policy)
    seen = {}
    with toca_fx.session(timesteps=[float(call[example.timestep][0]) for call in calls]) as run:
        for call in calls[:2]:
            began = time.perf_counter()
            fast(**call)
            seen[run.report().steps[-1].kind] = time.perf_counter() - began
        run.close()  # otherwise a warning would say that steps are missing
    print(
        " + ".join(f"{seconds:.1f} s {kind}" for kind, seconds in seen.items()),
        f"= {sum(seen.values()):.1f} s",
    )


def main() -> None:
    """Run all measurements."""
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    for what in ("torch.compile", "toca_fx"):
        with tempfile.TemporaryDirectory() as folder:
            for start in ("cold", "warm"):
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
                done = subprocess.run(
                    [sys.executable, __file__, what],
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                )
                print(f"{what}, {start}: {done.stdout.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
