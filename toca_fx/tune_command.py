"""`toca-fx tune`: calibrate the model that is named, and write the policy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toca_fx.diagnostics import PolicyError
from toca_fx.named import UnknownModelError, function_named
from toca_fx.quality.calibrate import calibrate
from toca_fx.quality.samples import Run

DONE, PROBLEMS, UNKNOWN = 0, 1, 2


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    try:
        target, runs = _target(arguments.target)
    except UnknownModelError as error:
        print(error.args[0], file=sys.stderr)
        return UNKNOWN
    try:
        policy = calibrate(
            target,
            runs,
            arguments.full,
            arguments.policy,
            order=arguments.order,
            budget=arguments.budget,
        )
    except (PolicyError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return PROBLEMS
    text = policy.to_yaml()
    if arguments.output is None:
        print(text, end="")
    else:
        Path(arguments.output).write_text(text, encoding="utf-8")
        print(f"{policy.description}\nwrote {arguments.output}")
    return DONE


def _target(name: str) -> tuple[Any, Sequence[Run]]:
    """The model or pipeline, and its runs, that the function ``name`` returns."""
    if ":" not in name:
        raise UnknownModelError(
            f"unknown target `{name}`: expected module:function or file.py:function, a function "
            "that returns a model and its runs"
        )
    made = function_named(name)()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Sequence)):
        raise UnknownModelError(
            f"{name}: expected the function to return (model or pipeline, list of runs), got a "
            f"{type(made).__name__}"
        )
    return made[0], made[1]
