"""The command: see the package."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import tools.frontier
from toca_fx.demo import digits
from toca_fx.diagnostics import PolicyError
from tools.frontier import measures, show
from tools.frontier.measure import Bench
from tools.frontier.points import Point, parse
from tools.frontier.results import Results, Row
from tools.frontier.setups import STEPS, Setup, setup_of
from tools.frontier.timing import compiled, time_runs

RESULTS = Path(__file__).resolve().parents[1] / "results"
CACHE = Path("~/.cache/toca_fx/frontier")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for and is not known yet; draw what is known."""
    arguments = _parser().parse_args(argv)
    file = arguments.out or RESULTS / f"frontier-{arguments.model}.json"
    console = Console()
    if arguments.points or not arguments.draw:
        _measure(arguments, file, console)
    if arguments.draw:
        for written in show.write(Results(file, {})):
            console.print(f"wrote {written}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.frontier",
        description=tools.frontier.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=("digits", "emoji"))
    parser.add_argument("--weights", type=Path, help="the folder of the emoji model's weights")
    parser.add_argument("--points", nargs="+", default=[], metavar="POINT")
    parser.add_argument("--grids", type=Path, help="a JSON file: timesteps of the model by name")
    parser.add_argument("--samples", type=int, help="default: 40 digits, 16 emoji")
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting noise")
    parser.add_argument("--time", action="store_true", help="latency too: on a quiet machine")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    parser.add_argument(
        "--frechet", type=int, metavar="SAMPLES", help="the distance to the data too; digits only"
    )
    parser.add_argument("--out", type=Path, help="the results, a JSON file")
    parser.add_argument("--cache", type=Path, default=CACHE, help="the folder of uncached images")
    parser.add_argument("--draw", action="store_true", help="write a picture and a table")
    return parser


def _asked(arguments: argparse.Namespace, file: Path) -> tuple[Setup, list[Point], Results]:
    """What is to be measured, and what is known of it. Raises ValueError and OSError."""
    if arguments.frechet and arguments.model != "digits":
        raise ValueError("--frechet: the emoji model has no classifier; digits have")
    setup = setup_of(arguments.model, arguments.samples, arguments.weights)
    grids = json.loads(arguments.grids.read_text(encoding="utf-8")) if arguments.grids else {}
    texts = arguments.points or setup.baselines
    points = [parse(text, setup.samplers, grids) for text in texts]
    for point in points:
        if point.peer is not None and setup.name != "digits":
            raise ValueError(f"{point.text}: peers are put around the digits' model only")
    conditions = {
        "model": setup.name,
        "weights": setup.weights,
        "samples": setup.shape[0],
        "seed": arguments.seed,
        "own": f"{setup.own}:{STEPS}",
        "converged": ":".join(map(str, setup.converged)),
    }
    return setup, points, Results(file, conditions)


def _measure(arguments: argparse.Namespace, file: Path, console: Console) -> None:
    try:
        setup, points, results = _asked(arguments, file)
    except (ValueError, OSError, PolicyError) as error:
        raise SystemExit(str(error)) from error
    bench = Bench(setup, arguments.seed, arguments.cache.expanduser())
    with Progress(console=console) as progress:
        task = progress.add_task(setup.name, total=len(points))
        for point in points:
            progress.update(task, description=point.text)
            row = measured(bench, point, results, arguments.frechet)
            progress.advance(task)
            progress.console.print(show.line(row), highlight=False, soft_wrap=True)
        if arguments.time:
            own = parse(f"{setup.own}:{STEPS}", setup.samplers)
            contestants = compiled(setup, [own, *points])
            runs = (arguments.rounds + 1) * len(contestants)
            task = progress.add_task("latency", total=runs)
            timed = time_runs(setup, contestants, arguments.rounds, lambda: progress.advance(task))
            for point, (seconds, share) in zip(points, timed[1:], strict=True):
                results.put(results.rows[point.text], seconds=seconds, time=share)


def measured(bench: Bench, point: Point, results: Results, frechet: int | None = None) -> Row:
    """The row of a point; measured only where ``results`` does not have it.

    ``frechet`` is the number of samples of the distance to the data, None for none.
    """
    row = results.row(point) or results.put(bench.row(point))
    if frechet is None or row.frechet_samples == frechet:
        return row
    if "halves" not in results.notes:
        real = measures.features(digits.load_classifier(), digits.load_images()[0])
        results.note(halves=measures.halves(real))
    return results.put(row, frechet=bench.frechet(point, frechet), frechet_samples=frechet)


if __name__ == "__main__":
    raise SystemExit(main())
