"""QwenImage and what took its autoencoder: 64 image tokens of 32 x 32 pixels, 12 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import left_half, masks, normal, picture, pipeline, prompts, transformer
from tools.pipelines.vaes import qwen_vae

_SIZE = {"height": 32, "width": 32, "output_type": "pt"}
_MASK = "prompt_embeds_mask"


def _qwen(name: str, model: str = "QwenImageTransformer2DModel") -> Any:
    return pipeline(
        name,
        transformer=transformer(model),
        vae=qwen_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _krea(tokens: int, seed: int = 0) -> torch.Tensor:
    """The hidden states of three layers of a text encoder."""
    return normal(1, tokens, 3, 24, seed=seed)


CASES = (
    Case(
        "QwenImagePipeline",
        lambda: _qwen("QwenImagePipeline"),
        lambda _: {**prompts(), **masks(name=_MASK), **_SIZE},
    ),
    Case(
        "QwenImagePipeline, prompts of two lengths",
        lambda: _qwen("QwenImagePipeline"),
        lambda _: {
            "prompt_embeds": normal(1, 12, 24),
            "prompt_embeds_mask": torch.ones(1, 12, dtype=torch.long),
            "negative_prompt_embeds": normal(1, 7, 24, seed=1),
            "negative_prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
            **_SIZE,
        },
    ),
    Case(
        "QwenImageImg2ImgPipeline",
        lambda: _qwen("QwenImageImg2ImgPipeline"),
        lambda _: {**prompts(), **masks(name=_MASK), "image": picture(), "strength": 0.6, **_SIZE},
    ),
    Case(
        "QwenImageInpaintPipeline",
        lambda: _qwen("QwenImageInpaintPipeline"),
        lambda _: {
            **prompts(),
            **masks(name=_MASK),
            "image": picture(),
            "mask_image": left_half(),
            "strength": 0.6,
            **_SIZE,
        },
    ),
    Case(
        "Krea2Pipeline",
        lambda: _qwen("Krea2Pipeline", "Krea2Transformer2DModel"),
        lambda _: {
            "prompt_embeds": _krea(12),
            "negative_prompt_embeds": _krea(12, seed=1),
            **masks(dtype=torch.bool, name=_MASK),
            **_SIZE,
        },
    ),
)
