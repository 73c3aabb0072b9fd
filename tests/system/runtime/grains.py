"""A small model, captured, and policies that keep histories of all of its units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import toca_fx
from tests.captured import Captured
from tests.helpers import make_inputs, make_policy, tiny
from toca_fx.policy import Policy

TOLERANCE = 1e-10

REUSED = {"modules": {"mlp": "reuse"}, "scores": {"staleness": 1.0}}
GRAINS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "skips and tokens": {"N": {"base": 5}, "skip": "alternate"},
    "module": REUSED,
    **{grain: {**REUSED, "cache": {"grain": grain}} for grain in ("block", "model", "output")},
}
NEWTON = {"basis": "newton", "order": 2}

NAMES = ("x", "t", "y")


def of_grain(grain: str, **sections: Any) -> Policy:
    return make_policy(**{**GRAINS[grain], "forecast": NEWTON, **sections})


@cache
def captured(dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[nn.Module, Captured]:
    model = tiny("original", layers=2).to(dtype)
    calls = [dict(zip(NAMES, each, strict=True)) for each in make_inputs(12, batch, dtype=dtype)]
    return model, Captured(model, calls)


def run(fast: Callable[[list[Any]], Tensor], inputs: Sequence[list[Any]]) -> list[Tensor]:
    with toca_fx.session(num_steps=len(inputs)):
        return [fast(each).clone() for each in inputs]


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
