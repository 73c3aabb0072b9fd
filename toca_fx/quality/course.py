"""What a model said along a generation, and what forecasts of it do to the final result.

All is float64, on the host, and pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from toca_fx.plan.forecast import history, weights
from toca_fx.policy import Forecast

_RANK = 1e-15  # of the largest eigenvalue: what is below is rounding


@dataclass(frozen=True)
class Course:
    """What a model said on the T steps of a generation, as far as forecasts of it can go wrong.

    ``outputs`` [T, S, D]: what each of S sources (guidance branches, halves of a batch) said, as
    coordinates in the space that they all span: inner products are those of the tensors. ``gains``
    [T, S]: by how much the final result moves for what a source says on a step.
    """

    outputs: Tensor
    gains: Tensor

    @property
    def steps(self) -> int:
        """T."""
        return len(self.gains)

    def emphasised(self, ratio: float) -> Course:
        """With gains that fall along the steps, the first by ``ratio`` against the last.

        What a model makes of an error that it is given is not in the gains: early ones may grow.
        """
        places = torch.linspace(0.5, -0.5, self.steps, dtype=torch.float64)
        return replace(self, gains=self.gains * (ratio**places)[:, None])


def course_of(gram: Tensor, gains: Tensor) -> Course:
    """The course of outputs with the inner products ``gram`` [T S, T S]; ``gains`` are [T, S]."""
    values, directions = torch.linalg.eigh(gram)
    counts = values > _RANK * values[-1]
    outputs = directions[:, counts] * values[counts].sqrt()
    return Course(outputs.reshape(*gains.shape, -1), gains)


class Errors:
    """What forecasts do to the final result, as vectors [D]; as if the model did not answer to it.

    A forecast is made of the last full steps: a *history* are their indices, ascending, as many as
    ``depth``. Where there were fewer, step 0 stands for those that are missing.
    """

    def __init__(self, course: Course, forecast: Forecast) -> None:
        self.steps = course.steps
        self.depth = history(forecast, self.steps)
        self._forecast = forecast
        # What the sampler makes on step t of the outputs of step a: [t, a, D].
        self._made = torch.einsum("ts,asd->tad", course.gains, course.outputs)
        self._weights: dict[tuple[int, ...], Tensor] = {}
        self._known: dict[tuple[int, ...], Tensor] = {}

    def behind(self, histories: Sequence[tuple[int, ...]]) -> Tensor:
        """What the forecasts behind a last full step do together, until the next: [n, m, D] for n
        histories with that last step and the next at 1 .. m steps from it, m at the end.
        """
        last = histories[0][-1]
        steps = torch.arange(last, self.steps)
        shares = torch.stack([self._shares(history)[: len(steps)] for history in histories])
        at = torch.tensor(histories)
        made = self._made[steps, steps].expand(len(histories), -1, -1).clone()
        for slot in range(at.shape[1]):
            made -= shares[:, :, slot, None] * self._made[steps[None], at[:, slot, None]]
        return made.cumsum(1)  # on the last full step itself it is nothing

    def total(self, full: Sequence[int]) -> float:
        """The square of the norm of what all forecasts together do, when the steps ``full``,
        ascending from 0, are computed.
        """
        whole = torch.zeros(self._made.shape[-1], dtype=torch.float64)
        padded = (*[0] * (self.depth - 1), *full)
        for index, (last, following) in enumerate(pairwise([*full, self.steps])):
            if following > last + 1:
                whole += self._of(padded[index : index + self.depth])[following - last - 1]
        return float(whole @ whole)

    def _of(self, history: tuple[int, ...]) -> Tensor:
        if history not in self._known:
            self._known[history] = self.behind([history])[0]
        return self._known[history]

    def _shares(self, history: tuple[int, ...]) -> Tensor:
        """The weights [T, depth] of a history, oldest first, at 0, 1, .. steps from its last.

        On the axis of steps only distances count. A step that is there twice counts once.
        """
        distances = tuple(step - history[-1] for step in history)
        if distances not in self._weights:
            times = tuple(map(float, sorted({*distances})))
            missing = [0.0] * (len(distances) - len(times))
            rows = [
                [*missing, *reversed(weights(self._forecast, times, float(now), now))]
                for now in range(self.steps)
            ]
            self._weights[distances] = torch.tensor(rows, dtype=torch.float64)
        return self._weights[distances]
