"""A recorded generation, and what the sampler makes of a model's outputs, found by replaying it.

A replay is the user's own loop with the recorded outputs in the model's place: it costs no model
call, and whatever the loop does (guidance, branches, solvers of higher order) is in it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from toca_fx.quality.course import Course, course_of
from toca_fx.quality.stand_in import Answer, Sample, latents_of, only_tensor, with_tensor

_SHIFT = 0.1  # of an output, in its own size: samplers are linear, or nearly
_SAME = 1e-2  # how far a replay may be from the recorded run, relatively
_COLUMNS = 2**16  # of outputs, that are made float64 at a time


@dataclass(frozen=True)
class Recording:
    """One uncached generation, in the host's memory.

    ``outputs`` are what the model said at each of its calls [rows, ...], in its dtype; ``branches``
    are the calls of a step, which have the same latents. ``final`` is what came out. ``form`` is
    what a call returned, and ``where`` the device of the tensor in it.
    """

    outputs: tuple[Tensor, ...]
    branches: int
    final: Tensor
    form: object
    where: torch.device

    @property
    def steps(self) -> int:
        """T, a step counted once."""
        return len(self.outputs) // self.branches

    @property
    def halves(self) -> int:
        """Rows of a call for each of the final result: 2 for guidance in one batch."""
        rows, images = len(self.outputs[0]), len(self.final)
        return rows // images if rows % images == 0 else 1


@torch.no_grad()
def record(name: str, sample: Sample, model: Answer) -> Recording:
    """Run ``sample``, called ``name`` in messages, on the uncached ``model``.

    Raises:
        ValueError, TypeError: it calls the model in a way that no forecast can follow.
    """
    outputs: list[Tensor] = []
    starts: list[int] = []
    latents, form = torch.empty(0), None
    where = torch.device("cpu")

    def answer(*args: object, **kwargs: object) -> object:
        nonlocal latents, form, where
        given = latents_of(args, kwargs).clone()
        if given.shape != latents.shape or not torch.equal(given, latents):
            starts.append(len(outputs))
        latents, form = given, model(*args, **kwargs)
        value = only_tensor(form)
        where = value.device
        outputs.append(value.detach().to("cpu", copy=True))
        return form

    final = sample(answer)
    if len(starts) < 2:
        raise ValueError(
            f"{name} called the model with {len(starts)} different latents: it has to sample, step "
            "by step, with the model that it is given"
        )
    branches = starts[1]
    if starts != [*range(0, len(outputs), branches)] or len(outputs) % branches:
        raise ValueError(
            f"{name} calls the model {branches} times on its first step, but not on every one: a "
            "forecast needs the same branches of guidance on all steps"
        )
    if len({output.shape for output in outputs}) > 1:
        raise ValueError(
            f"{name}: outputs of the model differ in shape from step to step, "
            f"{[*outputs[0].shape]} on the first: a forecast is of one shape"
        )
    return Recording(tuple(outputs), branches, final, form, where)


@torch.no_grad()
def course(name: str, sample: Sample, recording: Recording) -> Course:
    """The course of a recorded generation, its errors in units of the final result.

    For its gains each source is shifted on each step in a replay, all in the same direction; what
    comes out is the same too, but for a factor.

    Raises:
        ValueError: replays do not give what was recorded, or do not depend on the model.
    """
    replays = _Replays(name, sample, recording)
    rows = len(recording.outputs[0]) // recording.halves
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(rows, *recording.outputs[0].shape[1:], generator=generator)
    shift *= (
        _SHIFT * max(float(output.float().square().mean()) for output in recording.outputs) ** 0.5
    )
    heeded = _heeded(replays, shift)
    shift[:, heeded:] = 0
    sources = [
        (branch, half) for branch in range(recording.branches) for half in range(recording.halves)
    ]
    calls = range(len(recording.outputs))
    everywhere = [replays.moved(calls[b :: recording.branches], half, shift) for b, half in sources]
    reference = max(everywhere, key=lambda moved: float(moved.norm()))
    if not reference.any():
        raise ValueError(f"{name}: the final result does not depend on what the model returns")
    unit = reference / (reference.norm() * shift.double().norm())
    gains = [
        [
            float(replays.moved([step * recording.branches + b], half, shift) @ unit)
            for b, half in sources
        ]
        for step in range(recording.steps)
    ]
    return course_of(_gram(recording, heeded), torch.tensor(gains, dtype=torch.float64))


class _Replays:
    """The user's loop, with recorded outputs in the model's place."""

    def __init__(self, name: str, sample: Sample, recording: Recording) -> None:
        self._name, self._sample, self._recording = name, sample, recording
        self._final = self._run((), 0, torch.empty(0))
        recorded = recording.final.double().flatten()
        if (self._final - recorded).norm() > _SAME * recorded.norm():
            raise ValueError(
                f"{name} gave another result for the same outputs of the model: it has to start "
                "from the same noise each time, so give its generator a seed inside of it"
            )

    def moved(self, calls: Container[int], half: int, shift: Tensor) -> Tensor:
        """By how much the final result, made flat, moves when one half of what the model says at
        ``calls`` is shifted; float64.
        """
        return self._run(calls, half, shift) - self._final

    def _run(self, calls: Container[int], half: int, shift: Tensor) -> Tensor:
        outputs, made = self._recording.outputs, 0

        def answer(*args: object, **kwargs: object) -> object:
            nonlocal made
            if made == len(outputs):
                raise ValueError(f"{self._name} called the model more often than the first time")
            output = outputs[made].clone()
            if made in calls:
                output[half * len(shift) : (half + 1) * len(shift)] += shift.to(output.dtype)
            made += 1
            return with_tensor(self._recording.form, output.to(self._recording.where))

        return self._sample(answer).double().flatten()


def _heeded(replays: _Replays, shift: Tensor) -> int:
    """How many channels of an output count. Of the models that say a variance too, samplers that
    draw no noise heed the first half of them.
    """
    channels = shift.shape[1] if shift.ndim > 1 else 1
    if channels % 2:
        return channels
    behind = shift.clone()
    behind[:, : channels // 2] = 0
    everywhere = range(2**31)
    return channels if replays.moved(everywhere, 0, behind).any() else channels // 2


def _gram(recording: Recording, heeded: int) -> Tensor:
    """The inner products of all sources on all steps, float64 [T S, T S]."""
    flat = [
        part[:, :heeded].flatten()
        for output in recording.outputs
        for part in output.chunk(recording.halves)
    ]
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, len(flat[0]), _COLUMNS):
        columns = torch.stack([each[start : start + _COLUMNS] for each in flat]).double()
        gram += columns @ columns.T
    return gram
