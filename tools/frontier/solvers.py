"""The samplers: the users' own, and the solvers of diffusers, on even steps or on a grid.

Each is made for a number of steps, or for the timesteps of the model's calls, and is as a scheduler
of diffusers: ``timesteps``, and ``step(prediction, timestep, images).prev_sample``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from toca_fx.demo import digits
from tools import emoji

Grid: TypeAlias = int | Sequence[float]
Sampler: TypeAlias = Callable[[Grid], Any]

SOLVERS = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


def of_digits() -> Mapping[str, Sampler]:
    """By name; they start at the noise of zero signal, as the digits' DDIM does."""
    return {"ddim": _ddim, **{name: _of_digits(kind) for name, kind in SOLVERS.items()}}


def of_emoji() -> Mapping[str, Sampler]:
    """By name; ``ab2`` is Adams-Bashforth of order 2, which a skip with a line forecasts."""
    found: dict[str, Sampler] = {
        "euler": lambda at: emoji.AdamsBashforth(_emoji_timesteps(at), order=1),
        "ab2": lambda at: emoji.AdamsBashforth(_emoji_timesteps(at), order=2),
    }
    return {**found, **{name: _of_emoji(kind) for name, kind in SOLVERS.items()}}


def _ddim(at: Grid) -> Any:
    if not isinstance(at, int):
        raise ValueError("ddim: diffusers' DDIM takes a number of steps only; dpm++ takes a grid")
    scheduler = digits.build_scheduler()
    scheduler.set_timesteps(at)
    return scheduler


def _of_digits(kind: Any) -> Sampler:
    def solver(at: Grid) -> Any:
        # As users change samplers: betas, prediction and spacing are those of the DDIM.
        scheduler = kind.from_config(digits.build_scheduler().config)
        scheduler.set_timesteps(at if isinstance(at, int) else len(at))
        if isinstance(at, int):
            return scheduler
        cumulated = scheduler.alphas_cumprod.double().numpy()
        sigmas = np.sqrt(1 / cumulated - 1)[np.asarray(at, dtype=int)]
        return _placed(scheduler, at, sigmas)

    return solver


def _of_emoji(kind: Any) -> Sampler:
    def solver(at: Grid) -> Any:
        scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True)
        timesteps = _emoji_timesteps(at)
        scheduler.set_timesteps(len(timesteps))
        # Diffusers rounds the timesteps of flows down to whole numbers; the model takes any. It
        # starts below 1, where the log-SNR is infinite.
        sigmas = np.minimum(np.asarray(timesteps) / 1000, float(scheduler.sigmas[0]))
        return _placed(scheduler, timesteps, sigmas)

    return solver


def _placed(scheduler: Any, timesteps: Sequence[float], sigmas: Any) -> Any:
    """A solver of diffusers on given timesteps, at the noise levels ``sigmas``; the last is 0."""
    integers = all(float(timestep).is_integer() for timestep in timesteps)
    kind = torch.int64 if integers else torch.float32
    scheduler.timesteps = torch.tensor(timesteps, dtype=kind)
    scheduler.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32)
    scheduler.set_begin_index(0)
    return scheduler


def _emoji_timesteps(at: Grid) -> list[float]:
    return emoji.even(at) if isinstance(at, int) else list(at)
