"""A scheduler's timesteps in the units of a model's argument, found at the first call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from toca_fx.runtime.clock import Told
from toca_fx.runtime.schedules import Schedule, Timestep, fits

_TRAINED = 1000.0  # the length of most schedulers' scale
_MOST = 1024  # numbers that a timestep may have, as it is read


@dataclass(frozen=True)
class Scheduled:
    """What a session has whose timesteps a scheduler tells.

    The model's argument has them in units of its own, which may have one of the numbers ``scales``
    in it. ``warnings`` and ``notes`` are where its words go: what somebody has had does not come
    again.
    """

    scales: Sequence[float] = ()
    warnings: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def in_units(
        self, run: Told, timestep: Timestep, dtype: torch.dtype, call: Told | None
    ) -> Told:
        """What was told of a ``run``, with its timesteps as the model has them: see below.

        ``call`` is what came with the first call, at ``timestep``.
        """
        if run.timesteps is None:
            return run
        at = None if call is None else call.position
        return replace(run, timesteps=in_units(run.timesteps, timestep, dtype, at, self.scales))


def in_units(
    told: Schedule,
    timestep: Timestep,
    dtype: torch.dtype,
    at: int | None = None,
    scales: Sequence[float] = (),
) -> Schedule:
    """The timesteps that were ``told``, as the model's argument has them, of type ``dtype``.

    ``timestep`` is the argument at the first call, which is number ``at`` (None: any). Units are
    those of diffusers' pipelines: t, t / 1000, 1 - t / 1000 and 1000 - t, the same with ``scales``
    instead of 1000, and t times a scale, rounded before or after. Of an argument with one value per
    row, frame or token those move that are the first call's, the others stay. What fits to the last
    digit comes before what fits but for rounding; if nothing fits, ``told`` is returned.
    """
    if any(len(each) != 1 for each in told) or len(timestep) > _MOST:
        return told
    raw = torch.tensor(told, dtype=torch.float64).flatten()
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    places = range(len(told)) if at is None else (at,)
    for allowed in dict.fromkeys((0.0, rounding)):
        for converted in _candidates(raw, dtype, scales):
            for place in places:
                moving = [fits(converted, place, (each,), allowed) for each in timestep]
                if any(moving) and converted[place] != (0.0,):
                    pairs = [*zip(moving, timestep, strict=True)]
                    return tuple(
                        tuple(now if moves else each for moves, each in pairs)
                        for (now,) in converted
                    )
    return told


def _candidates(raw: Tensor, dtype: torch.dtype, scales: Sequence[float]) -> Iterator[Schedule]:
    """``raw`` in all units, in the arithmetic of ``dtype``; the plainest ones come first."""
    known = tuple(dict.fromkeys((_TRAINED, *scales)))
    given = [raw.to(torch.float32), raw.to(dtype)] if dtype.is_floating_point else [raw]
    for candidates in zip(*(_units(each, known) for each in given), strict=True):
        for found in candidates:
            yield tuple((float(each),) for each in found.to(dtype).double())


def _units(t: Tensor, scales: Sequence[float]) -> Iterator[Tensor]:
    yield t
    for scale in scales:
        yield t / scale
        yield 1 - t / scale
        yield (scale - t) / scale
        yield scale - t
        yield t * scale
        yield t / _TRAINED * scale
