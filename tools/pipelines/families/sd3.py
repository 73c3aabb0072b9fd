"""Stable Diffusion 3: 64 image tokens of 32 x 32 pixels, 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import normal, pipeline, transformer
from tools.pipelines.vaes import image_vae


def _sd3(name: str = "StableDiffusion3Pipeline", scheduler: Any = None, **components: Any) -> Any:
    return pipeline(
        name,
        transformer=transformer("SD3Transformer2DModel"),
        vae=image_vae(shift_factor=0.06, scaling_factor=1.5),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        **components,
    )


def _inputs() -> dict[str, Any]:
    return {
        "prompt_embeds": normal(1, 12, 24),
        "pooled_prompt_embeds": normal(1, 32, seed=1),
        "negative_prompt_embeds": normal(1, 12, 24, seed=2),
        "negative_pooled_prompt_embeds": normal(1, 32, seed=3),
        "height": 32,
        "width": 32,
        "output_type": "pt",
    }


CASES = (Case("StableDiffusion3Pipeline", _sd3, lambda _: _inputs()),)
