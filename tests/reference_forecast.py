"""Forecasts, written to be read: what a step makes of the values that full steps left.

It works on the values themselves, as the authors do (tables of differences that each full step
renews, fits of coefficients), where ``toca_fx.plan.forecast`` computes weights; nothing is shared
but the policy data. In float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.polynomial.chebyshev import chebvander
from numpy.polynomial.hermite import hermval
from numpy.typing import NDArray
from torch import Tensor

from toca_fx.plan.times import LOG_SNR_LIMIT
from toca_fx.policy import Policy, SitePolicy
from toca_fx.policy.forecast import Forecast

Array: TypeAlias = NDArray[np.float64]


class Moment(NamedTuple):
    """A call of a generation, by its number and its timestep."""

    call: int
    timestep: float


class History:
    """What one unit was at full steps, oldest first, and what is made of it later."""

    def __init__(self, policy: Forecast) -> None:
        assert policy.time in (None, "step", "timestep"), "no other time here"
        self.policy = policy
        self.moments: list[Moment] = []
        self.values: list[Tensor] = []

    @classmethod
    def of(cls, policy: Policy | SitePolicy, total: int) -> History:
        """That of a unit in a generation of ``total`` steps.

        Taylor's authors difference from the last but one of the first full steps on.
        """
        own, first = policy.forecast, policy.N.first
        if own.ignore is None and own.basis in ("taylor", "hermite"):
            count = first if isinstance(first, int) else math.ceil(round(first * total, 6))
            own = replace(own, ignore=max(0, count - 2))
        return cls(own)

    def add(self, now: Moment, value: Tensor) -> None:
        self.moments.append(now)
        self.values.append(value)

    def clear(self) -> None:
        self.moments.clear()
        self.values.clear()

    def at(self, now: Moment) -> Tensor:
        """What the unit is made of on a step that does not compute it."""
        axis = 1 if self.policy.time == "timestep" else 0
        times = [float(moment[axis]) for moment in self.moments]
        kept = self.policy.history or len(times)
        ignored = max(0, (self.policy.ignore or 0) - len(times[:-kept]))
        found = forecast(
            replace(self.policy, ignore=ignored),
            [value.double().numpy() for value in self.values[-kept:]],
            times[-kept:],
            float(now[axis]),
            now.call - self.moments[-1].call,
        )
        return torch.tensor(found, dtype=self.values[-1].dtype)


def forecast(
    policy: Forecast,
    values: Sequence[Array],
    times: Sequence[float],
    now: float,
    distance: int = 1,
) -> Array:
    """The value at ``now``, from those of *all* full steps of a generation, oldest first."""
    ignored = min(policy.ignore or 0, len(values) - 1)
    at: dict[float, Array] = {}
    for time, value in list(zip(times, values, strict=True))[ignored:]:
        at.pop(time, None)  # a second value at one time is another try at it
        at[time] = value
    told, known = list(at), list(at.values())
    found = _by_basis(policy, known, told, now, distance)
    if policy.blend is not None:
        line = _neville(known[-2:], told[-2:], now)
        found = policy.blend * found + (1 - policy.blend) * line
    if policy.damping is not None:
        found = known[-1] + policy.damping * (found - known[-1])
    return found


def _by_basis(
    policy: Forecast, values: list[Array], times: list[float], now: float, distance: int
) -> Array:
    order = 1 if policy.order is None else policy.order
    if policy.basis == "table":
        assert policy.weights
        listed = (*policy.weights, *[policy.weights[-1]] * distance)[distance - 1]
        if len(listed) > len(values):
            return values[-1]
        return sum((w * v for w, v in zip(listed, values[::-1], strict=False)), 0 * values[-1])
    if policy.basis == "reuse" or policy.order == 0:
        return values[-1]
    if policy.basis == "newton":
        return _neville(values[-order - 1 :], times[-order - 1 :], now)
    if policy.basis == "chebyshev":
        return _ridge_fit(policy, np.stack(values), np.array(times), now)
    table = _difference_table(values, times, order)
    k = now - times[-1]
    if policy.basis == "taylor":
        return sum((d * k**i / math.factorial(i) for i, d in enumerate(table)), 0 * values[-1])
    sigma = 0.5 if policy.sigma is None else policy.sigma
    scaled = [
        sigma**i * hermval(sigma * k, [0.0] * i + [1.0]) / math.factorial(i)
        for i in range(len(table))
    ]
    return sum((d * h for d, h in zip(table, scaled, strict=True)), 0 * values[-1])


def _difference_table(values: list[Array], times: list[float], order: int) -> list[Array]:
    """D_0, D_1, .. as they are after the last full step; each full step makes them anew."""
    before: list[Array] = []
    for at, value in enumerate(values):
        table = [value]
        for older in before[:order]:
            table.append((table[-1] - older) / (times[at] - times[at - 1]))
        before = table
    return before


def _neville(values: list[Array], times: list[float], now: float) -> Array:
    """The polynomial through all values, at ``now``."""
    found = list(values)
    for width in range(1, len(values)):
        for i in range(len(values) - width):
            first, last = times[i], times[i + width]
            found[i] = ((now - first) * found[i + 1] - (now - last) * found[i]) / (last - first)
    return found[0]


def _ridge_fit(policy: Forecast, values: Array, times: Array, now: float) -> Array:
    """Coefficients C = argmin |Phi C - F|^2 + ridge |C|^2, at ``now``."""
    order = 4 if policy.order is None else policy.order
    ridge = 0.1 if policy.ridge is None else policy.ridge
    everything = np.array([*times, now])
    tau = {
        None: everything / 25 - 1,
        "step": everything / 25 - 1,
        "timestep": 2 * everything / everything.max() - 1,
        "sigma": 2 * everything / everything.max() - 1,
        "log_snr": everything / LOG_SNR_LIMIT,
    }[policy.time]
    if ridge == 0:
        order = min(order, len(times) - 1)
    phi = chebvander(tau, order)
    rows = np.concatenate([phi[:-1], math.sqrt(ridge) * np.eye(order + 1)])
    flat = values.reshape(len(values), -1)
    wanted = np.concatenate([flat, np.zeros((order + 1, flat.shape[1]))])
    fitted, *_ = np.linalg.lstsq(rows, wanted, rcond=1e-15)
    return (phi[-1] @ fitted).reshape(values.shape[1:])
