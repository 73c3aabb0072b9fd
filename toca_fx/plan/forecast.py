"""The weights of a forecast: a unit's value as a sum of those that it had at full steps.

With F_0, F_1, .. the values kept, newest first, t_0, t_1, .. their times and s the present,

    F^(s) = sum over j of w_j F_j

whatever the basis, and w depends on times only: it is known before anything runs. Everything is in
float64 and takes microseconds. A basis is a function and a row of ``_BASES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, zip_longest
from operator import mul
from typing import NamedTuple

from toca_fx.plan.times import LOG_SNR_LIMIT
from toca_fx.policy.forecast import MAX_HISTORY, Basis, Forecast

Times = tuple[float, ...]


class _Rule(NamedTuple):
    """A basis.

    ``weights(forecast, times, now, distance)`` are those of the values at ``times``, which differ
    and are newest first; it may return fewer, the rest count nothing. ``kept(forecast,
    full_steps)`` is how many values it takes in a generation of so many full steps.
    """

    weights: Callable[[Forecast, Times, float, int], Sequence[float]]
    kept: Callable[[Forecast, int], int]


@lru_cache(maxsize=4096)
def weights(
    forecast: Forecast, times: Times, now: float, distance: int = 1, ran: int | None = None
) -> Times:
    """The weights of the values kept, *newest first*, for the time ``now``.

    ``times`` are those of the values kept, *oldest first*, on the axis ``forecast.time``
    (``times.time_of``): of the last full steps, at most ``history`` of them. ``distance`` counts
    the steps since the newest. ``ran`` counts the full steps of the generation so far; without it,
    they are those kept. It tells which of the values are among the first ``forecast.ignore``:
    these have weight 0, but for the newest value.

    The order is as high as the values that count allow. Of values at equal times only the newest
    counts, so that the order is one less (unless more than order + 1 are kept): a second full
    step at one timestep, as Heun's, is another try at the same value.

    Raises:
        ValueError: no value is kept.
    """
    if not times:
        raise ValueError("times is empty: no full step has left a value to forecast from")
    lost = (len(times) if ran is None else ran) - len(times)
    ignored = min(max(0, (forecast.ignore or 0) - lost), len(times) - 1)
    slots: dict[float, int] = {}
    for slot, time in enumerate(reversed(times[ignored:])):
        slots.setdefault(time, slot)
    known = tuple(slots)
    found = _rule_of(forecast).weights(forecast, known, now, distance)
    if forecast.blend is not None:
        found = _mix(forecast.blend, found, _through(known[:2], now))
    if forecast.damping is not None:
        found = _mix(forecast.damping, found, (1.0,))
    placed = [0.0] * len(times)
    for slot, weight in zip(slots.values(), found, strict=False):
        placed[slot] = weight
    return tuple(placed)


def history(forecast: Forecast, full_steps: int) -> int:
    """H: how many values a unit keeps in a generation of ``full_steps`` full steps."""
    kept = forecast.history
    if kept is None:
        kept = _rule_of(forecast).kept(forecast, full_steps)
    # A single value is read as it is, without a weight.
    return kept if forecast.blend is None and forecast.basis != "table" else max(kept, 2)


def degree(forecast: Forecast) -> int:
    """The degree of the polynomials that a forecast is made of, once enough values are kept."""
    if forecast.basis in ("reuse", "table"):
        return _rule_of(forecast).kept(forecast, 0) - 1
    return order_of(forecast)


def amplification(weights: Iterable[float]) -> float:
    """The highest factor by which errors of the values kept, as rounding, reach the forecast."""
    return sum(map(abs, weights))


def _rule_of(forecast: Forecast) -> _Rule:
    constant = forecast.order == 0 and forecast.basis != "table"
    return _BASES["reuse" if constant else forecast.basis]


def _mix(share: float, one: Sequence[float], other: Sequence[float]) -> list[float]:
    """``share`` of one, the rest of the other; what both agree on stays as it is, to the bit."""
    pairs = zip_longest(one, other, fillvalue=0.0)
    return [second + share * (first - second) for first, second in pairs]


def _through(times: Times, now: float) -> list[float]:
    """Lagrange: the weights of the polynomial through the values at ``times``."""
    return [
        math.prod((now - other) / (own - other) for other in times if other != own) for own in times
    ]


def _reuse(forecast: Forecast, times: Times, now: float, distance: int) -> Sequence[float]:
    return (1.0,)


def _newton(forecast: Forecast, times: Times, now: float, distance: int) -> Sequence[float]:
    return _through(times[: order_of(forecast) + 1], now)


def _taylor(forecast: Forecast, times: Times, now: float, distance: int) -> Sequence[float]:
    """TaylorSeer (arXiv 2503.06923): the sum over i of D_i k^i / i!, k = now - t_0."""
    k = now - times[0]
    return _of_differences(times, [k**i for i in range(order_of(forecast) + 1)])


def _hermite(forecast: Forecast, times: Times, now: float, distance: int) -> Sequence[float]:
    """HiCache (arXiv 2508.16984): as ``_taylor``, with sigma^i H_i(sigma k) for k^i.

    H_0 = 1, H_1 = 2 x, H_{i+1} = 2 x H_i - 2 i H_{i-1}.
    """
    sigma = 0.5 if forecast.sigma is None else forecast.sigma
    x = sigma * (now - times[0])
    last, current = 0.0, 1.0
    powers = []
    for i in range(order_of(forecast) + 1):
        powers.append(sigma**i * current)
        last, current = current, 2 * x * current - 2 * i * last
    return _of_differences(times, powers)


def _of_differences(times: Times, powers: Sequence[float]) -> list[float]:
    """The weights of the sum over i of powers[i] D_i / i!, with as many terms as ``times`` allow.

    D_0 = F, and at each full step D_{i+1} is D_i less the D_i of the full step before, over the
    time between these two: over unequal times no derivative, which is how TaylorSeer has it.
    """
    gaps = [newer - older for newer, older in pairwise(times)]
    factors = [power / math.factorial(i) for i, power in enumerate(powers[: len(times)])]
    # Weights of D_i at the full steps, newest first, from the highest i down to D_0 = F.
    found = [factors.pop()]
    while factors:
        slopes = [weight / gap for weight, gap in zip(found, gaps, strict=False)]
        found = [own - of_newer for of_newer, own in pairwise([0.0, *slopes, 0.0])]
        found[0] += factors.pop()
    return found


def _chebyshev(forecast: Forecast, times: Times, now: float, distance: int) -> Sequence[float]:
    """Spectrum: Phi (Phi^T Phi + ridge)^-1 phi(now), Phi[j, m] = T_m(tau(t_j)), m up to the order.

    It is computed as sum over m of q_m(t_j) q_m(now), where the polynomials q_m are the T_m made
    orthonormal (by Gram and Schmidt, twice) over the rows of Phi and those of the penalty: that
    squares no condition number. Without a penalty, polynomials that the values cannot tell from
    lower ones are left out. With one, the degree is the order from the first value on.
    """
    root = math.sqrt(0.1 if forecast.ridge is None else forecast.ridge)
    order = order_of(forecast)
    found = [0.0] * len(times)
    basis: list[tuple[list[float], float]] = []
    for m, column in enumerate(_chebyshevs(_taus(forecast, (*times, now)), order)):
        *rows, ahead = column
        rows += [root if i == m else 0.0 for i in range(order + 1)]
        size = math.hypot(*rows)
        for other, other_ahead in basis * 2:
            overlap = sum(map(mul, rows, other))
            rows = [mine - overlap * theirs for mine, theirs in zip(rows, other, strict=True)]
            ahead -= overlap * other_ahead
        rest = math.hypot(*rows)
        if rest > 1e-12 * size:
            rows, ahead = [row / rest for row in rows], ahead / rest
            basis.append((rows, ahead))
            found = [weight + row * ahead for weight, row in zip(found, rows, strict=False)]
    return found


def _chebyshevs(taus: Sequence[float], order: int) -> Iterator[list[float]]:
    """T_0 to T_order at ``taus``."""
    last, current = list(taus), [1.0] * len(taus)  # T_-1 = T_1
    for _ in range(order + 1):
        yield current
        after = [2 * x * t - u for x, t, u in zip(taus, current, last, strict=True)]
        last, current = current, after


def _taus(forecast: Forecast, times: Times) -> list[float]:
    """Times in [-1, 1].

    Steps as Spectrum has them, for 50 steps and for any other number: t / 25 - 1. Timesteps and
    sigmas go from the highest, where the generation starts, to 0; the log-SNR has ends. The ends
    are those of the whole generation and not of the values kept, as for steps: the penalty then
    is as little at the start, where all values are at one end, as it is there.
    """
    if forecast.time in ("timestep", "sigma"):
        top = max(times) or 1.0
        return [2 * time / top - 1 for time in times]
    if forecast.time == "log_snr":
        return [time / LOG_SNR_LIMIT for time in times]
    return [time / 25 - 1 for time in times]


def _table(forecast: Forecast, times: Times, now: float, distance: int) -> Sequence[float]:
    """The list for this distance, the last one beyond; reuse while it is longer than ``times``."""
    lists = forecast.weights or ()
    listed = lists[min(distance, len(lists)) - 1]
    return listed if len(listed) <= len(times) else (1.0,)


def order_of(forecast: Forecast) -> int:
    """The degree of a polynomial basis, once enough values are known."""
    default = 4 if forecast.basis == "chebyshev" else 1
    return default if forecast.order is None else forecast.order


def _one(forecast: Forecast, full_steps: int) -> int:
    return 1


def _one_more_than_order(forecast: Forecast, full_steps: int) -> int:
    return order_of(forecast) + 1


def _all(forecast: Forecast, full_steps: int) -> int:
    return min(max(full_steps, 1), MAX_HISTORY)


def _longest(forecast: Forecast, full_steps: int) -> int:
    return max(map(len, forecast.weights or ((),)))


_BASES: dict[Basis, _Rule] = {
    "reuse": _Rule(_reuse, _one),
    "newton": _Rule(_newton, _one_more_than_order),
    "taylor": _Rule(_taylor, _one_more_than_order),
    "hermite": _Rule(_hermite, _one_more_than_order),
    "chebyshev": _Rule(_chebyshev, _all),
    "table": _Rule(_table, _longest),
}
