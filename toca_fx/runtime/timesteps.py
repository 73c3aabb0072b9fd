"""The timestep of a call, as plain data."""

from __future__ import annotations

import torch
from torch import Tensor

from toca_fx.runtime.schedules import Timestep


def reading(timestep: Tensor) -> Timestep:
    """The value of a timestep: [], [B], or one per row and frame or token; equal neighbours once.

    It waits for the device.
    """
    if timestep.numel() == 1:
        return (float(timestep.item()),)
    found = timestep.flatten()
    if found.numel() > 16 or found.device.type != "cpu":
        found = found.unique_consecutive()  # type: ignore[no-untyped-call]
    values = [float(value) for value in found.tolist()]
    return tuple(value for at, value in enumerate(values) if not at or value != values[at - 1])


def rounding_of(timestep: Tensor) -> float:
    """How exact the values of a timestep are, relatively: the rounding of its dtype."""
    return torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
