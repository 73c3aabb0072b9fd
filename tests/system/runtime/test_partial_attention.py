"""Attention computed for fresh tokens only: with all tokens fresh it is the model, with half of
them it saves work.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import KINDS, make_inputs, make_policy, tiny
from tests.marks import slow_but
from tests.stdit3 import tiny_inputs, tiny_stdit3
from toca_fx.examples import build, examples, prediction, vary
from toca_fx.runtime.report import Report

STEPS = 6
ATTENTIONS = ("self_attention", "cross_attention", "joint_attention")
PARTIAL = {kind: {"weight": 1.0} for kind in (*ATTENTIONS, "mlp")}
CLASSES = (
    "PixArtTransformer2DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
)
MODELS = (*KINDS, *CLASSES, "STDiT3")
WHY = "of the classes, one of each kind of attention is enough"

Generation = tuple[nn.Module, list[dict[str, Any]]]


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def generation(name: str) -> Generation:
    """A tiny model in float64 and the keywords of each of its calls; the latents are new at every
    step.
    """
    if name in KINDS:
        names = (
            ("x", "t", "y") if name == "original" else ("hidden_states", "timestep", "class_labels")
        )
        steps = make_inputs(STEPS, dtype=torch.float64)
        return tiny(name, layers=2).double(), [
            dict(zip(names, step, strict=True)) for step in steps
        ]
    if name == "STDiT3":
        model = tiny_stdit3().double()
        steps = [
            tiny_inputs(model, seed=step, timestep=torch.full((2,), 900.0 - 150 * step))
            for step in range(STEPS)
        ]
        first = doubled(steps[0])
        return model, [
            {**first, **doubled({name: step[name] for name in ("x", "timestep")})} for step in steps
        ]
    example = examples()[name]
    built, inputs = build(example, dtype=torch.float64)
    return built, [vary(example, inputs, step, STEPS) for step in range(STEPS)]


def images(output: Any) -> list[Tensor]:
    """The predicted tensors, whichever way a model returns them."""
    return [
        value.clone()
        for value in prediction(output.sample if hasattr(output, "sample") else output)
    ]


@cache
def uncached(name: str) -> list[list[Tensor]]:
    model, calls = generation(name)
    with torch.no_grad():
        return [images(model(**call)) for call in calls]


def cached(name: str, base: float, modules: dict[str, Any]) -> tuple[list[list[Tensor]], Report]:
    model, calls = generation(name)
    policy = make_policy(sampler={"steps": STEPS}, R={"base": base}, modules=modules)
    fast = toca_fx.compile(model, policy, inner="eager")
    with torch.no_grad(), toca_fx.session(num_steps=STEPS) as run:
        outputs = [images(fast(**call)) for call in calls]
    return outputs, run.report()


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "name", slow_but(["diffusers", "FluxTransformer2DModel", "STDiT3"], MODELS, WHY)
)
def test_with_all_tokens_fresh_it_is_the_model(name: str) -> None:
    outputs, report = cached(name, 0.0, PARTIAL)
    for step, (ours, theirs) in enumerate(zip(outputs, uncached(name), strict=True)):
        assert distance(ours, theirs) <= 1e-10, f"step {step}"
    assert {site.computed for site in report.sites} <= {
        (site.tokens,) * STEPS for site in report.sites
    }


@pytest.mark.parametrize("name", slow_but(["diffusers", "STDiT3"], MODELS, WHY))
def test_with_half_of_the_tokens_fresh_it_saves_work(name: str) -> None:
    outputs, report = cached(name, 0.5, PARTIAL)
    assert all(value.isfinite().all() for step in outputs for value in step)
    far = [distance(ours, theirs) for ours, theirs in zip(outputs, uncached(name), strict=True)]
    assert [step for step, error in enumerate(far) if error > 1e-6] == [1, 2, 4, 5]
    assert far[0] <= 1e-10
    attentions = [site for site in report.sites if site.kind in ATTENTIONS]
    assert attentions
    for site in attentions:
        part = site.tokens // 2
        assert site.computed == (site.tokens, part, part) * 2
    whole, whole_report = cached(
        name, 0.5, {**dict.fromkeys(ATTENTIONS, "compute"), "mlp": {"weight": 1.0}}
    )
    assert all(
        site.computed == (site.tokens,) * STEPS
        for site in whole_report.sites
        if site.kind in ATTENTIONS
    )
    assert report.flops_uncached == whole_report.flops_uncached
    assert report.flops_done < whole_report.flops_done
    assert far[2] != distance(whole[2], uncached(name)[2])
