"""FLUX.1: 64 image tokens of 32 x 32 pixels, 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from toca_fx.examples import examples
from tools.pipelines.case import Case
from tools.pipelines.parts import left_half, model, normal, picture, pipeline, transformer
from tools.pipelines.vaes import image_vae

_SIZE = {"height": 32, "width": 32, "output_type": "pt"}


def flux(name: str, config: dict[str, Any] | None = None, **components: Any) -> Any:
    """A FLUX.1 pipeline; ``config`` changes its transformer."""
    return pipeline(
        name,
        transformer=transformer("FluxTransformer2DModel", **(config or {})),
        vae=image_vae(shift_factor=0.06, scaling_factor=1.5),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **components,
    )


def _controlnet(name: str) -> Any:
    config = {**examples()["FluxTransformer2DModel"].config, "num_single_layers": 1}
    return flux(name, controlnet=model("FluxControlNetModel", seed=1, **config))


def _case(name: str, given: dict[str, Any], config: dict[str, Any] | None = None) -> Case:
    return Case(name, lambda: flux(name, config), lambda _: {**_text(), **given, **_SIZE})


def _text() -> dict[str, Any]:
    return {"prompt_embeds": normal(1, 12, 24), "pooled_prompt_embeds": normal(1, 24, seed=1)}


def _negative() -> dict[str, Any]:
    return {
        "negative_prompt_embeds": normal(1, 12, 24, seed=2),
        "negative_pooled_prompt_embeds": normal(1, 24, seed=3),
        "true_cfg_scale": 3.0,
    }


_IMAGE = {"image": picture()}
_MASKED = {**_IMAGE, "mask_image": left_half()}
_CONTROL = {"control_image": picture(seed=1)}
# The widths of a transformer that reads the latents of a picture beside the noise, and of one
# that reads a mask of the pixels too.
_BESIDE = {"in_channels": 32, "out_channels": 16}
_FILL = {"in_channels": 32 + 4 * 2 * 2, "out_channels": 16}
_EXACT = {"_auto_resize": False, "max_area": 32 * 32}

CASES = (
    _case("FluxPipeline", {}),
    Case(
        "FluxPipeline, true CFG",
        lambda: flux("FluxPipeline"),
        lambda _: {**_text(), **_negative(), **_SIZE},
    ),
    _case("FluxImg2ImgPipeline", {**_IMAGE, "strength": 0.6}),
    _case("FluxInpaintPipeline", {**_MASKED, "strength": 0.6}),
    _case("FluxFillPipeline", _MASKED, _FILL),
    _case("FluxKontextPipeline", {**_IMAGE, **_EXACT}),
    _case("FluxKontextInpaintPipeline", {**_MASKED, **_EXACT, "strength": 0.8}),
    _case("FluxControlPipeline", _CONTROL, _BESIDE),
    _case("FluxControlImg2ImgPipeline", {**_CONTROL, **_IMAGE, "strength": 0.6}, _BESIDE),
    _case("FluxControlInpaintPipeline", {**_CONTROL, **_MASKED, "strength": 0.6}, _BESIDE),
    Case(
        "FluxControlNetPipeline",
        lambda: _controlnet("FluxControlNetPipeline"),
        lambda _: {**_text(), **_CONTROL, **_SIZE},
    ),
    Case(
        "FluxControlNetPipeline, true CFG",
        lambda: _controlnet("FluxControlNetPipeline"),
        lambda _: {**_text(), **_negative(), **_CONTROL, **_SIZE},
    ),
    Case(
        "FluxControlNetImg2ImgPipeline",
        lambda: _controlnet("FluxControlNetImg2ImgPipeline"),
        lambda _: {**_text(), **_CONTROL, **_IMAGE, "strength": 0.6, **_SIZE},
    ),
    Case(
        "FluxControlNetInpaintPipeline",
        lambda: _controlnet("FluxControlNetInpaintPipeline"),
        lambda _: {**_text(), **_CONTROL, **_MASKED, "strength": 0.6, **_SIZE},
    ),
)
