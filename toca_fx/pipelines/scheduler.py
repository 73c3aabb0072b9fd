"""What a scheduler of diffusers says of a run, by the time that the model is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from toca_fx.diagnostics import MOST_STEPS


@dataclass(frozen=True)
class Timetable:
    """The timesteps of a run, call by call, and ``begin``, how many of the scheduler's lie ahead.

    ``source`` is the scheduler's own list: ``set_timesteps`` makes another one.
    """

    source: Any
    values: tuple[float, ...]
    begin: int


def timetable(scheduler: Any) -> Timetable | None:
    """The timesteps that the loop of a pipeline goes through; None: the scheduler has none.

    They are final when the model is called for the first time: ``strength``, the user's own
    ``timesteps`` or ``sigmas`` and the calls of second-order schedulers are in them.
    """
    source, begin = getattr(scheduler, "timesteps", None), _whole(scheduler, "begin_index") or 0
    try:
        values = torch.as_tensor(source, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    if values.dim() != 1 or not begin < len(values) <= MOST_STEPS or not values.isfinite().all():
        return None
    return Timetable(source, tuple(values[begin:].tolist()), begin)


def position(scheduler: Any, begin: int) -> int | None:
    """The number of the step, out of those behind ``begin``; None: the scheduler does not count.

    It begins to count with its first step.
    """
    if not hasattr(scheduler, "step_index"):
        return None
    index = _whole(scheduler, "step_index")
    return 0 if index is None else max(index - begin, 0)


def numbers(config: Any) -> tuple[float, ...]:
    """The numbers of a configuration that timesteps may be multiplied or divided by."""
    if not isinstance(config, Mapping):
        return ()
    found = (value for value in config.values() if type(value) in (int, float))
    return tuple(sorted({float(value) for value in found if value > 1}))


def _whole(scheduler: Any, name: str) -> int | None:
    value = getattr(scheduler, name, None)
    return value if isinstance(value, int) else None
