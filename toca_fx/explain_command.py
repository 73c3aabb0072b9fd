"""`toca-fx explain`: find the model that is named, explain it, print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from toca_fx.describe.explain import explain
from toca_fx.diagnostics import PolicyError, UnsupportedModelError, did_you_mean
from toca_fx.named import UnknownModelError, function_named
from toca_fx.policy import load_policy

DONE, PROBLEMS, UNKNOWN = 0, 1, 2


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    try:
        policy = None if arguments.policy is None else load_policy(arguments.policy)
    except PolicyError as error:
        print(error, file=sys.stderr)
        # Without a position: no such name, or no text to look at.
        return UNKNOWN if any(problem.line == 0 for problem in error.problems) else PROBLEMS
    try:
        model, inputs = _model(arguments.model, arguments.batch)
    except UnknownModelError as error:
        print(error.args[0], file=sys.stderr)
        return UNKNOWN
    try:
        explanation = explain(model, policy, num_steps=arguments.steps, **inputs)
    except (PolicyError, UnsupportedModelError) as error:
        print(error, file=sys.stderr)
        return PROBLEMS
    print(
        json.dumps(explanation.to_dict(), indent=2) if arguments.format == "json" else explanation
    )
    return DONE


def _model(name: str, batch: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model called ``name`` and the keyword arguments of one call."""
    if ":" not in name:
        return _of_diffusers(name, batch)
    made = function_named(name)(**({} if batch is None else {"batch": batch}))
    if not (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], nn.Module)
        and isinstance(made[1], Mapping)
    ):
        raise UnknownModelError(
            f"{name}: expected the function to return (module, mapping of keyword arguments), "
            f"got {_shown(made)}"
        )
    return made[0], dict(made[1])


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


def _of_diffusers(name: str, batch: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny example by its class, in float32, or a preset.

    Presets are in real size, without weights, and in bfloat16 as such models are run.
    """
    try:
        from toca_fx import examples as diffusers
    except ModuleNotFoundError as error:
        raise UnknownModelError(
            f"example models need the package {error.name}: pip install 'toca-fx[diffusers]'"
        ) from error
    if name in diffusers.PRESETS:
        return diffusers.build(
            diffusers.PRESETS[name], batch=batch, device="meta", dtype=torch.bfloat16
        )
    examples = diffusers.examples()
    if name in examples:
        return diffusers.build(examples[name], batch=batch)
    if name in diffusers.UNSUPPORTED:
        raise UnknownModelError(f"there is no example of `{name}`: {diffusers.UNSUPPORTED[name]}")
    close = did_you_mean(name, (*diffusers.PRESETS, *examples))
    raise UnknownModelError(
        f"unknown model `{name}`{close} (presets: {', '.join(diffusers.PRESETS)}; else a "
        "transformer class of diffusers, module:function or file.py:function)"
    )
