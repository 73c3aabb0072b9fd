"""FLUX.2 and its Klein: 64 image tokens of 32 x 32 pixels, 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import left_half, normal, picture, pipeline, transformer
from tools.pipelines.vaes import image_vae

_SIZE = {"height": 32, "width": 32, "output_type": "pt"}


def _flux2(name: str, guidance_embeds: bool = False, **components: Any) -> Any:
    return pipeline(
        name,
        transformer=transformer("Flux2Transformer2DModel", guidance_embeds=guidance_embeds),
        vae=image_vae(name="AutoencoderKLFlux2"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **components,
    )


def _two_prompts() -> dict[str, Any]:
    return {
        "prompt_embeds": normal(1, 12, 24),
        "negative_prompt_embeds": normal(1, 12, 24, seed=1),
    }


CASES = (
    Case(
        "Flux2Pipeline",
        lambda: _flux2("Flux2Pipeline", guidance_embeds=True),
        lambda _: {"prompt_embeds": normal(1, 12, 24), **_SIZE},
    ),
    Case(
        "Flux2KleinPipeline",
        lambda: _flux2("Flux2KleinPipeline"),
        lambda _: {**_two_prompts(), **_SIZE},
    ),
    Case(
        "Flux2KleinPipeline, two pictures",
        lambda: _flux2("Flux2KleinPipeline"),
        lambda _: {**_two_prompts(), **_SIZE, "image": [picture(64, 64), picture(64, 96, seed=1)]},
    ),
    Case(
        "Flux2KleinInpaintPipeline",
        lambda: _flux2("Flux2KleinInpaintPipeline"),
        lambda _: {
            **_two_prompts(),
            **_SIZE,
            "image": picture(64, 64),
            "mask_image": left_half(64, 64),
            "strength": 0.8,
        },
    ),
    Case(
        "Flux2KleinKVPipeline",
        lambda: _flux2("Flux2KleinKVPipeline"),
        lambda _: {"prompt_embeds": normal(1, 12, 24), **_SIZE, "image": picture(64, 64)},
    ),
)
