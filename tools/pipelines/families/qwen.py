"""QwenImage and what took its autoencoder: 64 image tokens of 32 x 32 pixels, 12 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from toca_fx.examples import examples
from tools.pipelines.case import Case
from tools.pipelines.encoders import Processor
from tools.pipelines.parts import (
    left_half,
    masks,
    model,
    normal,
    picture,
    pipeline,
    prompts,
    transformer,
)
from tools.pipelines.vaes import qwen21_vae, qwen_vae

_SIZE = {"height": 32, "width": 32, "output_type": "pt"}
# What is edited is scaled to 1024 x 1024 pixels, which latents 64 times smaller make few tokens.
_EDITED = {"height": 512, "width": 512, "output_type": "pt"}
_MASK = "prompt_embeds_mask"


def _qwen(
    name: str, cls: str = "QwenImageTransformer2DModel", factor: int = 4, **components: Any
) -> Any:
    return pipeline(
        name,
        transformer=transformer(cls),
        vae=qwen_vae(factor=factor),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **components,
    )


def _controlnet(**more: Any) -> Any:
    config = {**more, **examples()["QwenImageTransformer2DModel"].config, "num_layers": 1}
    return model("QwenImageControlNetModel", seed=1, **config)


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
    Case(
        "QwenImageEditPipeline",
        lambda: _qwen("QwenImageEditPipeline", factor=64),
        lambda _: {**prompts(), **masks(name=_MASK), **_EDITED, "image": picture()},
    ),
    Case(
        "QwenImageEditInpaintPipeline",
        lambda: _qwen("QwenImageEditInpaintPipeline", factor=64),
        lambda _: {
            **prompts(),
            **masks(name=_MASK),
            **_EDITED,
            "image": picture(),
            "mask_image": left_half(),
            "strength": 0.6,
        },
    ),
    Case(
        "QwenImageEditPlusPipeline",
        lambda: _qwen("QwenImageEditPlusPipeline", factor=64),
        lambda _: {
            **prompts(),
            **masks(name=_MASK),
            **_EDITED,
            "image": [picture(), picture(seed=1)],
        },
    ),
    Case(
        "QwenImageControlNetPipeline",
        lambda: _qwen("QwenImageControlNetPipeline", controlnet=_controlnet()),
        lambda _: {**prompts(), **masks(name=_MASK), **_SIZE, "control_image": picture(seed=1)},
    ),
    Case(
        "NucleusMoEImagePipeline",
        lambda: _qwen("NucleusMoEImagePipeline", "NucleusMoEImageTransformer2DModel"),
        lambda _: {**prompts(), **masks(name=_MASK), **_SIZE},
    ),
    Case(
        "QwenImageControlNetInpaintPipeline",
        lambda: _qwen(
            "QwenImageControlNetInpaintPipeline",
            controlnet=_controlnet(extra_condition_channels=4),
        ),
        lambda _: {
            **prompts(),
            **masks(name=_MASK),
            **_SIZE,
            "control_image": picture(seed=1),
            "control_mask": left_half(),
        },
    ),
    Case(
        "QwenImage21Pipeline",
        lambda: pipeline(
            "QwenImage21Pipeline",
            transformer=transformer("QwenImage21Transformer2DModel"),
            vae=qwen21_vae(),
            processor=Processor(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ),
        lambda _: {
            **prompts(),
            **masks(name=_MASK),
            "true_cfg_scale": 4.0,
            "height": 256,
            "width": 256,
            "output_type": "pt",
        },
        known="captured in several graphs, with a warning: a list is made of a mask",
    ),
)
