"""Generations of small models on the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import toca_fx
from toca_fx.examples import build, examples, prediction, vary
from toca_fx.runtime.report import Report

DEVICE = os.environ.get("TOCA_GPU_TESTS_ON", "cuda")
DRY = DEVICE == "cpu"
STEPS = 8
MODELS = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "SD3Transformer2DModel",
    "QwenImageTransformer2DModel",
)
POLICY: dict[str, Any] = {
    "version": 1,
    "name": "gpu",
    "sampler": {"steps": STEPS},
    "N": {"base": 3, "first": 2},
    "R": {"base": 0.6, "step_weight": 0.5},
    "scores": {"self_attention": 1.0, "staleness": 0.25},
}


@dataclass(frozen=True)
class Case:
    """A model, the calls of a generation, and their timesteps."""

    model: nn.Module
    calls: Sequence[dict[str, Any]]
    timesteps: Sequence[float]


def make(name: str, dtype: torch.dtype, seed: int = 0) -> Case:
    """A tiny model of diffusers with random weights."""
    example = examples()[name]
    model, first = build(example, device=DEVICE, dtype=dtype)
    calls = [vary(example, first, step, STEPS, seed) for step in range(STEPS)]
    return Case(model, calls, [float(call[example.timestep].flatten()[0]) for call in calls])


@torch.no_grad()
def uncached(case: Case) -> Tensor:
    """The outputs of the untouched model, [steps, ...] in float32."""
    return torch.stack([prediction(case.model(**call))[0].float().clone() for call in case.calls])


@torch.no_grad()
def generate(fast: nn.Module, case: Case, *, told: bool = True) -> tuple[Tensor, Report]:
    """The outputs of one generation, [steps, ...] in float32, and its report."""
    known = case.timesteps if told else None
    with toca_fx.session(STEPS, timesteps=known) as run:
        outputs = [prediction(fast(**call))[0] for call in case.calls]
    return torch.stack(outputs).float(), run.report()


def apart(some: Tensor, others: Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((some - others).abs().max() / others.abs().max())
