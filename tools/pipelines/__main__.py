"""The command: see the package."""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten

import tools.pipelines
from tools.pipelines.check import check
from tools.pipelines.matrices import ALL
from tools.pipelines.measure import Row, measured
from tools.pipelines.page import page

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "tools" / "results" / "pipelines.json"
_PAGE = _ROOT / "docs" / "pipelines.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Check or measure cases; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.pipelines",
        description=tools.pipelines.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="by default all")
    parser.add_argument("--check", action="store_true", help="only build and call, uncompiled")
    parser.add_argument("--anew", action="store_true", help="measure what has been measured too")
    parser.add_argument("--draw", action="store_true", help="only write the page")
    arguments = parser.parse_args(argv)
    names = arguments.cases or list(ALL)
    unknown = [name for name in names if name not in ALL]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are: {'; '.join(ALL)}")
    if arguments.check:
        return _check(names)
    return _measure([] if arguments.draw else names, arguments.anew)


def _check(names: Iterable[str]) -> int:
    wrong = 0
    for name in names:
        began = time.perf_counter()
        try:
            checked = check(ALL[name])
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


def _measure(names: Iterable[str], anew: bool) -> int:
    """Measure what is missing, keep each row as it comes, and write the page."""
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    known = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    rows = {name: Row(**known[name]) for name in ALL if name in known}
    for name in names:
        if name in rows and not anew:
            continue
        began = time.perf_counter()
        row = rows[name] = measured(ALL[name])
        says = "right" if row.right else row.problem or "wrong"
        print(f"{name}: {says} ({time.perf_counter() - began:.0f} s)", flush=True)
        ordered = {name: rows[name].to_dict() for name in ALL if name in rows}
        _RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    _PAGE.write_text(page(rows))
    return 0 if all(row.right for row in rows.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
