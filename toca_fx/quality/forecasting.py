"""A generation on a schedule, without any compiler: the model on full steps, forecasts between."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from toca_fx.plan.forecast import history, weights
from toca_fx.policy import Forecast
from toca_fx.quality.stand_in import Answer, only_tensor, with_tensor


class Forecasting:
    """Calls ``model`` on the full ``steps``, and forecasts what it returns on the others."""

    def __init__(
        self, model: Answer, forecast: Forecast, steps: Sequence[int], branches: int
    ) -> None:
        self._model, self._forecast, self._full = model, forecast, frozenset(steps)
        kept = history(forecast, len(steps))
        self._values = [deque[tuple[int, Tensor]](maxlen=kept) for _ in range(branches)]
        self._form: object = None
        self._calls = 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        """What the model returns on its next call, or would."""
        step, branch = divmod(self._calls, len(self._values))
        self._calls += 1
        if step in self._full:
            self._form = self._model(*args, **kwargs)
            self._values[branch].append((step, only_tensor(self._form).clone()))
            return self._form
        return with_tensor(self._form, self._forecast_at(step, self._values[branch]))

    def _forecast_at(self, step: int, values: deque[tuple[int, Tensor]]) -> Tensor:
        times = tuple(float(at) for at, _ in values)
        shares = reversed(weights(self._forecast, times, float(step), step - values[-1][0]))
        newest = values[-1][1]
        made = torch.zeros_like(newest, dtype=torch.promote_types(newest.dtype, torch.float32))
        for share, (_, value) in zip(shares, values, strict=True):
            made.add_(value, alpha=share)
        return made.to(newest.dtype)
