"""The time axes of forecasts."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from toca_fx.plan.times import LOG_SNR_LIMIT, Noise, time_of

DDPM: tuple[Noise, ...] = ("linear", "scaled_linear", "cosine")


def signal(noise: Noise) -> np.ndarray:
    """The product of 1 - beta, as diffusers' DDPMScheduler has it."""
    if noise == "linear":
        betas = np.linspace(1e-4, 0.02, 1000)
    elif noise == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    else:
        t = np.arange(1001) / 1000
        a = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - a[1:] / a[:-1], 0.999)
    return np.cumprod(1 - betas)


def test_steps_and_timesteps_are_as_they_are() -> None:
    assert time_of("step", 7, 981.0, "linear") == 7
    assert time_of("timestep", 7, 981.25, "linear") == 981.25


@pytest.mark.parametrize("noise", DDPM)
def test_ddpm(noise: Noise) -> None:
    a = signal(noise)
    for t in (0, 1, 37, 500, 998, 999):
        sigma = time_of("sigma", 0, float(t), noise)
        assert sigma == pytest.approx(np.sqrt((1 - a[t]) / a[t]), rel=1e-9)
        wanted = np.clip(np.log(a[t] / (1 - a[t])), -LOG_SNR_LIMIT, LOG_SNR_LIMIT)
        assert time_of("log_snr", 0, float(t), noise) == pytest.approx(wanted, abs=1e-9)


def test_alphas_cumprod_of_diffusers() -> None:
    """What diffusers 0.42 has at 0, 500 and 999."""
    known: dict[Noise, tuple[float, ...]] = {
        "linear": (0.9999, 0.0777967, 4.03583e-05),
        "scaled_linear": (0.99915, 0.276332, 0.0046601),
        "cosine": (0.999959, 0.492285, 2.42873e-09),
    }
    for noise, values in known.items():
        for t, value in zip((0, 500, 999), values, strict=True):
            found = 1 / (1 + time_of("sigma", 0, float(t), noise) ** 2)
            assert found == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("noise", DDPM)
def test_ddpm_between_and_beyond_whole_timesteps(noise: Noise) -> None:
    at = [time_of("log_snr", 0, t, noise) for t in (500.0, 500.25, 501.0)]
    assert at[1] == pytest.approx(0.75 * at[0] + 0.25 * at[2])
    for kind in ("sigma", "log_snr"):
        for beyond, end in ((-3.0, 0.0), (1000.0, 999.0)):
            assert time_of(kind, 0, beyond, noise) == time_of(kind, 0, end, noise)
        assert time_of(kind, 0, 998.5, noise) != time_of(kind, 0, 998.0, noise)


def test_flow() -> None:
    assert time_of("sigma", 0, 0.25, "flow") == time_of("sigma", 0, 250.0, "flow") == 0.25
    assert time_of("sigma", 0, 1000.0, "flow") == time_of("sigma", 0, 1.0, "flow") == 1
    assert time_of("log_snr", 0, 0.25, "flow") == pytest.approx(2 * math.log(3))
    assert time_of("log_snr", 0, 1.0, "flow") == pytest.approx(-LOG_SNR_LIMIT)
    assert time_of("log_snr", 0, 0.0, "flow") == pytest.approx(LOG_SNR_LIMIT)


@pytest.mark.parametrize("noise", ["flow", *DDPM])
def test_noise_falls_and_the_log_snr_rises_as_timesteps_fall(noise: Noise) -> None:
    timesteps = [1000.0 * (1 - i / 50) for i in range(51)]
    for kind, sign in (("sigma", -1), ("log_snr", 1)):
        times = [time_of(kind, 0, t, noise) for t in timesteps]
        assert all(math.isfinite(time) for time in times)
        assert all(sign * (b - a) >= 0 for a, b in pairwise(times))
