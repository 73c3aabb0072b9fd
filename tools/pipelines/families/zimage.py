"""Z-Image: 64 image tokens of 32 x 32 pixels, 12 of the prompt and 9 of the negative one."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import left_half, model, normal, picture, pipeline, transformer
from tools.pipelines.vaes import image_vae


def _zimage(name: str, **components: Any) -> Any:
    return pipeline(
        name,
        transformer=transformer("ZImageTransformer2DModel"),
        vae=image_vae(shift_factor=0.06),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **components,
    )


def _controlnet(channels: int) -> Any:
    """A ControlNet that reads latents of ``channels``."""
    return model(
        "ZImageControlNetModel",
        seed=1,
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        dim=48,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
    )


def _inputs(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": [normal(12, 24)],
        "negative_prompt_embeds": [normal(9, 24, seed=1)],
        "height": 32,
        "width": 32,
        "output_type": "pt",
        **more,
    }


CASES = (
    Case("ZImagePipeline", lambda: _zimage("ZImagePipeline"), lambda _: _inputs()),
    Case(
        "ZImageImg2ImgPipeline",
        lambda: _zimage("ZImageImg2ImgPipeline"),
        lambda _: _inputs(image=picture(), strength=0.6),
    ),
    Case(
        "ZImageInpaintPipeline",
        lambda: _zimage("ZImageInpaintPipeline"),
        lambda _: _inputs(image=picture(), mask_image=left_half(), strength=0.6),
    ),
    Case(
        "ZImageControlNetPipeline",
        lambda: _zimage("ZImageControlNetPipeline", controlnet=_controlnet(4)),
        lambda _: _inputs(control_image=picture(seed=1)),
    ),
    Case(
        "ZImageControlNetInpaintPipeline",
        lambda: _zimage("ZImageControlNetInpaintPipeline", controlnet=_controlnet(2 * 4 + 1)),
        lambda _: _inputs(control_image=picture(seed=1), image=picture(), mask_image=left_half()),
    ),
    Case(
        "ZImageOmniPipeline",
        lambda: _zimage("ZImageOmniPipeline"),
        lambda _: _inputs(
            prompt_embeds=[[normal(12, 24)]], negative_prompt_embeds=[[normal(9, 24, seed=1)]]
        ),
    ),
)
