"""The time axes of a forecast: what the polynomials are polynomials of. In float64, on the host."""

from __future__ import annotations

import math
from functools import cache
from itertools import accumulate
from operator import mul
from typing import Literal, TypeAlias

from toca_fx.policy.forecast import Time

Noise: TypeAlias = Literal["flow", "linear", "scaled_linear", "cosine"]

TIMESTEPS = 1000
"""Timesteps that models are trained on, 0 to 999."""

LOG_SNR_LIMIT = 2 * math.log(TIMESTEPS - 1)
"""The ends of the log-SNR: those of a flow one timestep from its ends, where it is infinite."""


def time_of(kind: Time, step: int, timestep: float, noise: Noise) -> float:
    """The time of a model call on the axis ``kind``.

    step        ``step``, which counts up from 0, whichever way the policy's s runs
    timestep    ``timestep``, as the model gets it
    sigma       the noise in units of the signal; of a flow, the share of noise
    log_snr     ln of signal power over noise power, from -LOG_SNR_LIMIT to LOG_SNR_LIMIT

    A ``flow`` is x = (1 - sigma) image + sigma noise, its timestep sigma or 1000 sigma: what is not
    above 1 is taken for sigma. The others are the schedules of DDPM, with the betas that diffusers
    has by default: x = sqrt(a) image + sqrt(1 - a) noise, sigma = sqrt((1 - a) / a); between whole
    timesteps the log-SNR is a line, and beyond 0 and 999 it is that of the end.
    """
    if kind == "step":
        return float(step)
    if kind == "timestep":
        return float(timestep)
    if noise == "flow":
        sigma = timestep / TIMESTEPS if timestep > 1 else timestep
        if kind == "sigma":
            return sigma
        inside = min(max(sigma, 1 / TIMESTEPS), 1 - 1 / TIMESTEPS)
        log_snr = 2 * math.log((1 - inside) / inside)
    else:
        log_snr = _between(_log_snrs(noise), timestep)
        if kind == "sigma":
            return math.exp(-log_snr / 2)
    return min(max(log_snr, -LOG_SNR_LIMIT), LOG_SNR_LIMIT)


def _between(values: tuple[float, ...], place: float) -> float:
    """The value at ``place`` on the line through its neighbours."""
    place = min(max(place, 0.0), len(values) - 1.0)
    below = min(int(place), len(values) - 2)
    return values[below] + (place - below) * (values[below + 1] - values[below])


@cache
def _log_snrs(noise: Noise) -> tuple[float, ...]:
    """By whole timestep, ln(a / (1 - a)) with a the product of 1 - beta so far."""
    signal = accumulate((1 - beta for beta in _betas(noise)), mul)
    return tuple(math.log(a / (1 - a)) for a in signal)


def _betas(noise: Noise) -> list[float]:
    shares = [i / (TIMESTEPS - 1) for i in range(TIMESTEPS)]
    if noise == "linear":
        return [1e-4 + share * (0.02 - 1e-4) for share in shares]
    if noise == "scaled_linear":
        first, last = math.sqrt(0.00085), math.sqrt(0.012)
        return [(first + share * (last - first)) ** 2 for share in shares]
    # Nichol and Dhariwal, 2021: a is a squared cosine, and no beta is above 0.999.
    angles = [(i / TIMESTEPS + 0.008) / 1.008 * math.pi / 2 for i in range(TIMESTEPS + 1)]
    signal = [math.cos(angle) ** 2 for angle in angles]
    return [min(1 - signal[i + 1] / signal[i], 0.999) for i in range(TIMESTEPS)]
