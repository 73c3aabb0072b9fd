"""The `toca-fx` command.

Each subcommand is one `add_...` function; heavy imports stay inside the functions that run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TextIO

from toca_fx import __version__
from toca_fx.diagnostics import PolicyError, Problem, UnreadablePolicyError, count

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

CLEAN, PROBLEMS, UNREADABLE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    _never_fail_to_print(sys.stdout, sys.stderr)
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s"
    )
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except BrokenPipeError:  # `toca-fx ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PROBLEMS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="toca-fx", description="Token-wise feature caching for diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"toca-fx {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what is being done")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_validate(subparsers)
    add_explain(subparsers)
    add_tune(subparsers)
    add_bench(subparsers)
    add_demo(subparsers)
    return parser


def _never_fail_to_print(*streams: TextIO) -> None:
    """Escape characters that the terminal's encoding lacks, instead of failing.

    File names and policies may hold such characters.
    """
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def add_validate(subparsers: Subparsers) -> None:
    """Add `validate FILE...`, which reports every problem of policy files.

    The exit status is 0 for clean files, 1 for problems, 2 for unreadable files.
    """
    parser = subparsers.add_parser(
        "validate",
        help="check policy files",
        description="Check policy files and report every problem as file:line:col: message.",
        epilog="exit status: 0 no errors, 1 errors, 2 a file could not be read",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a policy in YAML")
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="how to report (default: text)"
    )
    parser.add_argument("--strict", action="store_true", help="treat warnings as errors")
    parser.set_defaults(run=_validate)


@dataclass(frozen=True)
class _Checked:
    """The outcome for one file."""

    file: str
    problems: tuple[Problem, ...]
    readable: bool = True

    def number(self, severity: str) -> int:
        return sum(problem.severity == severity for problem in self.problems)


def _validate(arguments: argparse.Namespace) -> int:
    checked = [_check_one(file, arguments.strict) for file in arguments.files]
    report = _report_json if arguments.format == "json" else _report_text
    print(report(checked))
    if not all(outcome.readable for outcome in checked):
        return UNREADABLE
    return PROBLEMS if any(outcome.number("error") for outcome in checked) else CLEAN


def _check_one(file: str, strict: bool) -> _Checked:
    from toca_fx.policy import validate_file

    try:
        problems = validate_file(file)
    except UnreadablePolicyError as error:
        return _Checked(file, error.problems, readable=False)
    if strict:
        problems = tuple(replace(problem, severity="error") for problem in problems)
    return _Checked(file, problems)


def _report_json(checked: Sequence[_Checked]) -> str:
    problems = [asdict(problem) for outcome in checked for problem in outcome.problems]
    return json.dumps(problems, indent=2)


def _report_text(checked: Sequence[_Checked]) -> str:
    lines: list[str] = []
    for outcome in checked:
        lines += [str(problem) for problem in outcome.problems] or [f"{outcome.file}: ok"]
    numbers = {
        severity: sum(outcome.number(severity) for outcome in checked)
        for severity in ("error", "warning")
    }
    found = " and ".join(count(number, noun) for noun, number in numbers.items() if number)
    return "\n".join([*lines, f"{count(len(checked), 'file')} checked: {found or 'no problems'}"])


def add_explain(subparsers: Subparsers) -> None:
    """Add `explain MODEL`, which shows what a policy would do with a model, and runs nothing.

    The exit status is 0, 1 for problems, 2 for unknown names.
    """
    parser = subparsers.add_parser(
        "explain",
        help="show what a policy would do with a model",
        description=(
            "Show the sites of a model, what a policy does with each, what was not matched, FLOPs "
            "and cache bytes. Runs nothing."
        ),
        epilog=(
            "exit status: 0 explained, 1 the policy or the model has problems, 2 no such model or "
            "policy"
        ),
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=(
            "a model class or a preset of toca_fx.examples, or module:function or "
            "file.py:function, a function that returns a module and the keyword arguments of one "
            "call"
        ),
    )
    parser.add_argument(
        "--policy", help="shipped name or path (default: the one that compile would pick)"
    )
    parser.add_argument(
        "--steps", type=_positive, help="model calls of a generation (default: the policy's)"
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        help="samples (default: those of one image); a function gets it as batch=, if given",
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="how to report (default: text)"
    )
    parser.set_defaults(run=_explain)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {text}")
    return number


def _blocks(text: str) -> int | str:
    return text if text == "all" else _positive(text)


def _explain(arguments: argparse.Namespace) -> int:
    with _uncollected():
        from toca_fx import explain_command

        return explain_command.main(arguments)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector: what imports and a trace make stays to the end, millions of objects,
    and walking over them again and again takes a sixth of the command's time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def add_tune(subparsers: Subparsers) -> None:
    """Add `tune TARGET`, which makes a policy for a model and its sampler.

    The exit status is 0, 1 for problems, 2 for unknown names.
    """
    parser = subparsers.add_parser(
        "tune",
        help="make a policy for a model and its sampler",
        description=(
            "Place full steps where a model and its sampler need them most: one generation is "
            "recorded, others refine. Writes a policy, in which the other steps are forecasts."
        ),
        epilog="exit status: 0 done, 1 the policy or the runs have problems, 2 no such target",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help=(
            "module:function or file.py:function, a function that returns a model (or a diffusers "
            "pipeline) and a list of runs: functions run(model) that sample and return the final "
            "latents, or keyword arguments for the pipeline"
        ),
    )
    parser.add_argument(
        "--place-only",
        action="store_true",
        required=True,
        help="place full steps; there is no other search yet",
    )
    parser.add_argument(
        "--full", type=_positive, default=21, help="number of full steps (default: 21)"
    )
    parser.add_argument(
        "--order", type=int, choices=(0, 1, 2), help="of the forecast (default: 1 or 2, the better)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=8.0,
        help="uncached generations that the refinement may take the time of (default: 8)",
    )
    parser.add_argument("--policy", help="shipped name or path of what to start from")
    parser.add_argument("--output", metavar="FILE", help="the policy to write (default: print it)")
    parser.set_defaults(run=_tune)


def _tune(arguments: argparse.Namespace) -> int:
    from toca_fx import tune_command

    return tune_command.main(arguments)


def add_bench(subparsers: Subparsers) -> None:
    """Add `bench`: time saved against work saved. It needs the extra `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure time saved against work saved",
        description=(
            "Time models with random weights, uncached and cached, both compiled by inductor: "
            "step by step in turn on a CPU; whole generations in turn on a GPU, where the "
            "uncached model runs with and without CUDA graphs, and the faster one counts."
        ),
    )
    from toca_fx.bench.cases import CASES

    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)} (default: dit-xl-2)"
    )
    parser.add_argument("--policy", help="shipped name or path (default: the case's own)")
    parser.add_argument(
        "--blocks",
        type=_blocks,
        help=(
            "transformer blocks of each kind, or `all` of the model's (default: what a small "
            "machine stands)"
        ),
    )
    parser.add_argument(
        "--steps", type=_positive, help="model calls of a generation (default: the case's own)"
    )
    parser.add_argument(
        "--images",
        type=_positive,
        default=1,
        help="images of a generation; with guidance each has two rows of the batch (default: 1)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=5,
        help="generations measured, after those that warm up (default: 5)",
    )
    parser.add_argument("--threads", type=_positive, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights and inputs (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument(
        "--mode",
        help=(
            "of toca_fx.compile, as of torch.compile, say reduce-overhead (default: none, toca_fx "
            "decides)"
        ),
    )
    parser.add_argument(
        "--alone", action="store_true", help="leave out FORA, the caches of diffusers and cache-dit"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--chart", metavar="FILE", help="draw work against time to this picture")
    parser.set_defaults(run=_bench)


def add_demo(subparsers: Subparsers) -> None:
    """Add `demo`: digits from the trained model that ships with the package.

    It needs the extra `demo`.
    """
    parser = subparsers.add_parser(
        "demo",
        help="generate digits, uncached and cached, and compare",
        description=(
            "Generate a grid of digits uncached, cached, by ToCa, and by what else takes as little "
            "time: fewer steps, and a better solver."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--policy", default="digits", help="shipped name or path")
    parser.add_argument("--per-class", type=int, default=4, help="digits of each class")
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting noise")
    parser.add_argument("--output", default="demo.png", metavar="FILE", help="the picture to write")
    parser.set_defaults(run=_demo)


def _bench(arguments: argparse.Namespace) -> int:
    return _with_extra("bench", "toca_fx.bench.run", arguments)


def _demo(arguments: argparse.Namespace) -> int:
    return _with_extra("demo", "toca_fx.demo.run", arguments)


def _with_extra(extra: str, module: str, arguments: argparse.Namespace) -> int:
    """Run a command whose packages are optional; say how to install them if they are missing."""
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(
            f"toca-fx {extra} needs the package {error.name}: pip install 'toca-fx[{extra}]'",
            file=sys.stderr,
        )
        return UNREADABLE
    try:
        return int(command.main(arguments))
    except PolicyError as error:
        print(error, file=sys.stderr)
        return PROBLEMS
