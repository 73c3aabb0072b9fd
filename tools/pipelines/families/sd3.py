"""Stable Diffusion 3: 64 image tokens of 32 x 32 pixels, 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from toca_fx.examples import examples
from tools.pipelines.case import Case
from tools.pipelines.parts import left_half, model, normal, picture, pipeline, transformer
from tools.pipelines.vaes import image_vae


def _sd3(
    name: str = "StableDiffusion3Pipeline",
    scheduler: Any = None,
    channels: int = 4,
    **components: Any,
) -> Any:
    return pipeline(
        name,
        transformer=transformer(
            "SD3Transformer2DModel", in_channels=channels, out_channels=channels
        ),
        vae=image_vae(channels, shift_factor=0.06, scaling_factor=1.5),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        **components,
    )


def _controlnet(**more: Any) -> Any:
    config = {**more, **examples()["SD3Transformer2DModel"].config, "num_layers": 1}
    return model("SD3ControlNetModel", seed=1, **config)


def _inputs(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": normal(1, 12, 24),
        "pooled_prompt_embeds": normal(1, 32, seed=1),
        "negative_prompt_embeds": normal(1, 12, 24, seed=2),
        "negative_pooled_prompt_embeds": normal(1, 32, seed=3),
        "height": 32,
        "width": 32,
        "output_type": "pt",
        **more,
    }


CASES = (
    Case("StableDiffusion3Pipeline", _sd3, lambda _: _inputs()),
    Case(
        "StableDiffusion3Img2ImgPipeline",
        lambda: _sd3("StableDiffusion3Img2ImgPipeline"),
        lambda _: _inputs(image=picture(), strength=0.6),
    ),
    Case(
        "StableDiffusion3InpaintPipeline",
        lambda: _sd3("StableDiffusion3InpaintPipeline", channels=16),
        lambda _: _inputs(image=picture(), mask_image=left_half(), strength=0.6),
    ),
    Case(
        "StableDiffusion3Pipeline, SLG",
        _sd3,
        lambda _: _inputs(
            skip_guidance_layers=[1], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.7
        ),
    ),
    Case(
        "StableDiffusion3PAGPipeline",
        lambda: _sd3("StableDiffusion3PAGPipeline", pag_applied_layers=["blocks.1"]),
        lambda _: _inputs(),
    ),
    Case(
        "StableDiffusion3PAGImg2ImgPipeline",
        lambda: _sd3("StableDiffusion3PAGImg2ImgPipeline", pag_applied_layers=["blocks.1"]),
        lambda _: _inputs(image=picture(), strength=0.6),
    ),
    Case(
        "StableDiffusion3Pipeline, Heun",
        lambda: _sd3(scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0)),
        lambda _: _inputs(),
    ),
    Case(
        "StableDiffusion3ControlNetPipeline",
        lambda: _sd3("StableDiffusion3ControlNetPipeline", controlnet=_controlnet()),
        lambda _: _inputs(control_image=picture(seed=1)),
    ),
    Case(
        "StableDiffusion3ControlNetInpaintingPipeline",
        lambda: _sd3(
            "StableDiffusion3ControlNetInpaintingPipeline",
            controlnet=_controlnet(extra_conditioning_channels=1),
        ),
        lambda _: _inputs(control_image=picture(seed=1), control_mask=left_half()),
    ),
)
