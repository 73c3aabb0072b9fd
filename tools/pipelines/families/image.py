"""Other pipelines of images: 24 to 256 image tokens, 12 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tools.pipelines.case import Case
from tools.pipelines.parts import (
    masks,
    normal,
    picture,
    pipeline,
    prompts,
    transformer,
)
from tools.pipelines.vaes import dc_vae, image_vae

_SIZE = {"height": 32, "width": 32, "output_type": "pt"}
# Of pipelines whose latents are 8 times smaller than the image, whatever the autoencoder.
_LARGE = {"height": 64, "width": 96, "output_type": "pt"}
_UNBINNED = {"use_resolution_binning": False}


def _image(name: str, model: str, scheduler: Any = None, vae: Any = None, **config: Any) -> Any:
    """A pipeline of a transformer class, flow matching and an autoencoder that halves sizes."""
    return pipeline(
        name,
        transformer=transformer(model, **config),
        vae=vae or image_vae(shift_factor=0.06, scaling_factor=1.5),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
    )


def _hunyuan_dit(name: str, **components: Any) -> Any:
    return pipeline(
        name,
        transformer=transformer("HunyuanDiT2DModel"),
        vae=image_vae(factor=8),
        scheduler=DDPMScheduler(),
        requires_safety_checker=False,
        **components,
    )


def _hunyuan_text() -> dict[str, Any]:
    """The embeddings of two text encoders: 8 tokens of 24 channels, 12 of 16."""
    second = {f"{name}_2": value for name, value in {**prompts(12, 16), **masks(12)}.items()}
    return {**prompts(8), **masks(8), **second}


def _chroma(name: str) -> Any:
    return _image(name, "ChromaTransformer2DModel")


CASES = (
    Case(
        "AuraFlowPipeline",
        lambda: _image("AuraFlowPipeline", "AuraFlowTransformer2DModel"),
        lambda _: {**prompts(), **masks(), **_SIZE},
    ),
    Case(
        "LuminaPipeline",
        lambda: _image("LuminaPipeline", "LuminaNextDiT2DModel", vae=image_vae(factor=8)),
        lambda _: {**prompts(), **masks(), **_LARGE},
    ),
    Case(
        "Lumina2Pipeline",
        lambda: _image(
            "Lumina2Pipeline",
            "Lumina2Transformer2DModel",
            vae=image_vae(factor=8, shift_factor=0.06),
        ),
        lambda _: {**prompts(), **masks(), **_LARGE},
    ),
    Case(
        "SanaPipeline",
        lambda: _image(
            "SanaPipeline",
            "SanaTransformer2DModel",
            DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            dc_vae(),
        ),
        lambda _: {**prompts(), **masks(), "negative_prompt": None, **_SIZE, **_UNBINNED},
    ),
    Case(
        "ZImagePipeline",
        lambda: _image("ZImagePipeline", "ZImageTransformer2DModel"),
        lambda _: {
            "prompt_embeds": [normal(12, 24)],
            "negative_prompt_embeds": [normal(9, 24, seed=1)],
            **_SIZE,
        },
    ),
    Case(
        "ZImageImg2ImgPipeline",
        lambda: _image("ZImageImg2ImgPipeline", "ZImageTransformer2DModel"),
        lambda _: {
            "prompt_embeds": [normal(12, 24)],
            "negative_prompt_embeds": [normal(9, 24, seed=1)],
            "image": picture(),
            "strength": 0.6,
            **_SIZE,
        },
    ),
    Case(
        "HunyuanDiTPipeline",
        lambda: _hunyuan_dit("HunyuanDiTPipeline"),
        lambda _: {**_hunyuan_text(), **_LARGE, **_UNBINNED},
    ),
    Case(
        "HunyuanDiTPAGPipeline",
        lambda: _hunyuan_dit("HunyuanDiTPAGPipeline", pag_applied_layers=["blocks.1"]),
        lambda _: {**_hunyuan_text(), **_LARGE, **_UNBINNED},
    ),
    Case(
        "BriaPipeline",
        lambda: _image("BriaPipeline", "BriaTransformer2DModel"),
        lambda _: {**prompts(), **_SIZE},
    ),
    Case(
        "ChromaPipeline",
        lambda: _chroma("ChromaPipeline"),
        lambda _: {**prompts(), **masks(dtype=torch.float), **_SIZE},
    ),
    Case(
        "ChromaImg2ImgPipeline",
        lambda: _chroma("ChromaImg2ImgPipeline"),
        lambda _: {
            **prompts(),
            **masks(dtype=torch.float),
            "image": picture(),
            "strength": 0.6,
            **_SIZE,
        },
    ),
    Case(
        "CogView4Pipeline",
        lambda: _image("CogView4Pipeline", "CogView4Transformer2DModel", vae=image_vae(factor=8)),
        lambda _: {**prompts(), **_LARGE},
    ),
    Case(
        "CogView3PlusPipeline",
        lambda: _image(
            "CogView3PlusPipeline",
            "CogView3PlusTransformer2DModel",
            DDPMScheduler(),
            image_vae(factor=8),
        ),
        lambda _: {**prompts(), **_LARGE},
    ),
    Case(
        "OvisImagePipeline",
        lambda: _image("OvisImagePipeline", "OvisImageTransformer2DModel"),
        lambda _: {**prompts(), "negative_prompt": None, **_SIZE},
    ),
    Case(
        "PRXPipeline",
        lambda: _image("PRXPipeline", "PRXTransformer2DModel"),
        lambda _: {**prompts(), **masks(dtype=torch.bool), **_SIZE, **_UNBINNED},
    ),
)
