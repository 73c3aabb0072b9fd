"""FLUX.1: 64 image tokens of 32 x 32 pixels, 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import normal, pipeline, transformer
from tools.pipelines.vaes import image_vae

_SIZE = {"height": 32, "width": 32, "output_type": "pt"}


def _flux(name: str, config: dict[str, Any] | None = None, **components: Any) -> Any:
    """A FLUX.1 pipeline; ``config`` changes its transformer."""
    return pipeline(
        name,
        transformer=transformer("FluxTransformer2DModel", **(config or {})),
        vae=image_vae(shift_factor=0.06, scaling_factor=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **components,
    )


def _text() -> dict[str, Any]:
    return {"prompt_embeds": normal(1, 12, 24), "pooled_prompt_embeds": normal(1, 24, seed=1)}


def _negative() -> dict[str, Any]:
    return {
        "negative_prompt_embeds": normal(1, 12, 24, seed=2),
        "negative_pooled_prompt_embeds": normal(1, 24, seed=3),
        "true_cfg_scale": 3.0,
    }


CASES = (
    Case("FluxPipeline", lambda: _flux("FluxPipeline"), lambda _: {**_text(), **_SIZE}),
    Case(
        "FluxPipeline, true CFG",
        lambda: _flux("FluxPipeline"),
        lambda _: {**_text(), **_negative(), **_SIZE},
    ),
)
