"""HunyuanDiT: 24 image tokens of 64 x 96 pixels, 8 and 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler

from toca_fx.examples import examples
from tools.pipelines.case import Case
from tools.pipelines.parts import (
    masks,
    model,
    picture,
    pipeline,
    prompts,
    transformer,
)
from tools.pipelines.vaes import image_vae

_SIZE = {
    "height": 64,
    "width": 96,
    "use_resolution_binning": False,
    "output_type": "pt",
}


def _hunyuan_dit(name: str, **components: Any) -> Any:
    return pipeline(
        name,
        transformer=transformer("HunyuanDiT2DModel"),
        vae=image_vae(factor=8),
        scheduler=DDPMScheduler(),
        requires_safety_checker=False,
        **components,
    )


def _controlnet() -> Any:
    config = dict(examples()["HunyuanDiT2DModel"].config)
    layers = config.pop("num_layers")
    return model("HunyuanDiT2DControlNetModel", seed=1, transformer_num_layers=layers, **config)


def _text() -> dict[str, Any]:
    """The embeddings of two text encoders: 8 tokens of 24 channels, 12 of 16."""
    second = {f"{name}_2": value for name, value in {**prompts(12, 16), **masks(12)}.items()}
    return {**prompts(8), **masks(8), **second}


CASES = (
    Case(
        "HunyuanDiTPipeline",
        lambda: _hunyuan_dit("HunyuanDiTPipeline"),
        lambda _: {**_text(), **_SIZE},
    ),
    Case(
        "HunyuanDiTPAGPipeline",
        lambda: _hunyuan_dit("HunyuanDiTPAGPipeline", pag_applied_layers=["blocks.1"]),
        lambda _: {**_text(), **_SIZE},
    ),
    Case(
        "HunyuanDiTControlNetPipeline",
        lambda: _hunyuan_dit(
            "HunyuanDiTControlNetPipeline",
            controlnet=_controlnet(),
        ),
        lambda _: {
            **_text(),
            **_SIZE,
            "control_image": picture(96, 64, seed=1),
        },
    ),
)
