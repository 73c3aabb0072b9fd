"""The timestep of a call, as plain data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toca_fx.runtime import watch, words
from toca_fx.runtime.schedules import Timestep

if TYPE_CHECKING:
    from toca_fx.runtime.clock import Told
    from toca_fx.runtime.generations import Generations
    from toca_fx.runtime.runner import Runner

log = logging.getLogger(__name__)

_MANY = 1024  # values that are listed one by one


def reading(timestep: Tensor) -> Timestep:
    """The value of a timestep: [], [B], or one per row and frame or token.

    It is one number if all are equal; samples of a batch that are alike count once. It waits for
    the device.
    """
    if timestep.numel() == 1:
        return (float(timestep.item()),)
    rows = timestep.reshape(len(timestep), -1)
    if timestep.dim() > 1 and bool((rows == rows[0]).all()):
        rows = rows[:1]
    if rows.numel() > _MANY:  # as runs of equal values, and how long they are
        values, counts = rows.flatten().unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        return tuple(map(float, (*values.tolist(), *(counts.tolist() if len(values) > 1 else ()))))
    return one_or_all(rows.flatten().tolist())


def one_or_all(values: Sequence[float]) -> Timestep:
    """Numbers as a timestep: one of them if they are equal."""
    found = tuple(map(float, values))
    return found[:1] if found == found[:1] * len(found) else found


def rounding_of(timestep: Tensor) -> float:
    """How exact the values of a timestep are, relatively: the rounding of its dtype."""
    return torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0


def read(
    known: Generations, runner: Runner, inputs: Sequence[Any], told: Told | None
) -> Timestep | None:
    """The value of a call's timestep; None if it is not needed.

    On an accelerator reading it waits for the device. In a session that is done for the first
    generation of the model only, or of its timesteps where they are told. ``told`` is what came
    with the call.
    """
    at = runner.program.analysis.inputs.timestep
    if at is None or inputs[at].numel() == 0:
        return None
    given: Tensor = inputs[at]
    if watch.reading_waits(given):
        if known.told is not None:
            listed = known.told.timesteps
            if known.model.read if listed is None else listed in known.model.schedules.whole:
                return None
        elif told is not None:
            return None
        elif not known.waits:
            known.waits = True
            log.warning("toca_fx: %s", words.WAITS)
    return reading(given)
