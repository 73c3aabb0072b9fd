"""The command: see the package."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from textwrap import shorten

import tools.pipelines
from tools.pipelines.cases import CASES
from tools.pipelines.check import check


def main(argv: Sequence[str] | None = None) -> int:
    """Check the cases; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.pipelines",
        description=tools.pipelines.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", nargs="*", metavar="CASE", required=True)
    names = parser.parse_args(argv).check or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are: {'; '.join(CASES)}")
    wrong = 0
    for name in names:
        began = time.perf_counter()
        try:
            checked = check(CASES[name])
        except Exception as error:  # a case that fails must not hide the others
            wrong += 1
            print(f"{name}: {type(error).__name__}: {shorten(str(error), 300)}", flush=True)
            continue
        shapes = ", ".join(str(tuple(output.shape)) for output in checked.outputs)
        calls = ", ".join(f"{which} {count}" for which, count in checked.calls.items())
        seconds = time.perf_counter() - began
        print(
            f"{name}: {calls}; {checked.per_step:g} a step; {shapes}; {seconds:.1f} s", flush=True
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
