"""Generations of a tiny model, run in sessions and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import toca_fx
from tests.helpers import Inputs, call, make_policy, run_all

DEFAULT = ["full", "partial", "partial"] * 4


def fast_twin(model: nn.Module, **sections: Any) -> nn.Module:
    return toca_fx.compile(model, make_policy(**sections), inner="eager")


def in_session(fast: nn.Module, inputs: Inputs, num_steps: int | None = None) -> list[Tensor]:
    with toca_fx.session(num_steps=num_steps):
        return run_all(fast, inputs)


def same(left: Sequence[Tensor], right: Sequence[Tensor], tolerance: float = 1e-4) -> bool:
    return all((a - b).abs().max() <= tolerance for a, b in zip(left, right, strict=True))


def uncached(model: nn.Module, step: tuple[Tensor, Tensor, Tensor], output: Tensor) -> bool:
    """Whether ``output`` is what the model gives by itself (a partial step is off by 1e-1 and
    more).
    """
    with torch.no_grad():
        return same([call(model, *step)], [output])


class Flaky:
    """An inner backend whose graphs write rubbish into their buffers and fail when told to."""

    def __init__(self) -> None:
        self.fails = False

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self.fails:
                for value in args:
                    if isinstance(value, Tensor) and value.shape == (2, 64, 32):  # caches
                        value.fill_(torch.nan)
                raise RuntimeError("out of luck")
            return graph(*args)

        return run
