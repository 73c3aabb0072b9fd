"""Other pipelines of images: 24 to 256 image tokens, 12 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
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
from tools.pipelines.vaes import image_vae

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


def _hidream() -> Any:
    pipe = _image("HiDreamImagePipeline", "HiDreamImageTransformer2DModel")
    # What it scales all images to.
    pipe.default_sample_size = 16
    return pipe


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
        known="captured in several graphs, with a warning: lengths of captions are read from masks",
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
    Case(
        "CogView4ControlPipeline",
        lambda: _image(
            "CogView4ControlPipeline",
            "CogView4Transformer2DModel",
            vae=image_vae(factor=8),
            in_channels=8,
        ),
        lambda _: {**prompts(), **_LARGE, "control_image": picture(96, 64)},
    ),
    Case(
        "HiDreamImagePipeline",
        _hidream,
        lambda _: {
            "prompt_embeds_t5": normal(1, 12, 24),
            "prompt_embeds_llama3": normal(3, 1, 8, 20, seed=1),
            "pooled_prompt_embeds": normal(1, 16, seed=2),
            "negative_prompt_embeds_t5": normal(1, 12, 24, seed=3),
            "negative_prompt_embeds_llama3": normal(3, 1, 8, 20, seed=4),
            "negative_pooled_prompt_embeds": normal(1, 16, seed=5),
            **_SIZE,
        },
        known="its mixture of experts has other shapes at every call, so that nothing is cached",
    ),
    Case(
        "ErnieImagePipeline",
        lambda: pipeline(
            "ErnieImagePipeline",
            transformer=transformer(
                "ErnieImageTransformer2DModel", in_channels=16, out_channels=16
            ),
            vae=image_vae(name="AutoencoderKLFlux2"),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ),
        lambda _: {
            "prompt_embeds": [normal(12, 24)],
            "negative_prompt_embeds": [normal(9, 24, seed=1)],
            "negative_prompt": None,
            **_SIZE,
            "use_pe": False,
        },
        known="no site is found: its stream is [tokens, batch, channels]",
    ),
    Case(
        "GlmImagePipeline",
        lambda: _image(
            "GlmImagePipeline",
            "GlmImageTransformer2DModel",
            vae=image_vae(factor=8, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        ),
        lambda _: {**prompts(), **_LARGE, "prior_token_ids": torch.arange(24)[None] % 32},
    ),
    Case(
        "BriaFibo2Pipeline",
        lambda: pipeline(
            "BriaFibo2Pipeline",
            transformer=transformer("BriaFibo2Transformer2DModel"),
            vae=image_vae(name="AutoencoderKLFlux2"),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ),
        lambda _: {
            "prompt_embeds": normal(1, 2, 12, 24),
            "negative_prompt_embeds": normal(1, 2, 12, 24, seed=1),
            **masks(dtype=torch.bool, name="prompt_embeds_mask"),
            **_SIZE,
        },
    ),
    Case(
        "PRXPixelPipeline",
        lambda: pipeline(
            "PRXPixelPipeline",
            transformer=transformer("PRXTransformer2DModel", in_channels=3),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ),
        lambda _: {
            **prompts(),
            **masks(dtype=torch.bool),
            "height": 16,
            "width": 16,
            **_UNBINNED,
            "output_type": "pt",
        },
    ),
)
