"""Images by a prompt in words, which a tiny text encoder reads: 64 image tokens."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from tools.pipelines.case import Case
from tools.pipelines.encoders import language_model, qwen3_vl, tokenizer
from tools.pipelines.parts import pipeline, transformer
from tools.pipelines.vaes import image_vae, wan22_vae

_SIZE = {"height": 32, "width": 32, "output_type": "pt"}


def _longcat() -> Any:
    pipe = pipeline(
        "LongCatImagePipeline",
        transformer=transformer("LongCatImageTransformer2DModel", in_channels=64),
        vae=image_vae(16, shift_factor=0.06),
        text_encoder=language_model(),
        tokenizer=tokenizer(512),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.tokenizer_max_length = 12
    return pipe


def _ideogram() -> Any:
    # The text encoder is read at 13 of its layers, each of 16 channels.
    config = {"in_channels": 16, "llm_features_dim": 13 * 16}
    return pipeline(
        "Ideogram4Pipeline",
        transformer=transformer("Ideogram4Transformer2DModel", **config),
        unconditional_transformer=transformer("Ideogram4Transformer2DModel", seed=1, **config),
        vae=image_vae(name="AutoencoderKLFlux2"),
        text_encoder=qwen3_vl(layers=36, width=16),
        tokenizer=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


CASES = (
    Case(
        "LongCatImagePipeline",
        _longcat,
        lambda _: {
            "prompt": "a cat",
            "negative_prompt": "a dog",
            **_SIZE,
            "enable_prompt_rewrite": False,
        },
    ),
    Case(
        "BriaFiboPipeline",
        lambda: pipeline(
            "BriaFiboPipeline",
            transformer=transformer(
                "BriaFiboTransformer2DModel", joint_attention_dim=48, text_encoder_dim=24
            ),
            vae=wan22_vae(),
            text_encoder=language_model(),
            tokenizer=tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ),
        lambda _: {
            "prompt": "a cat",
            "negative_prompt": "a dog",
            "height": 128,
            "width": 128,
            "output_type": "pt",
        },
    ),
    Case(
        "Ideogram4Pipeline, a transformer for each branch",
        _ideogram,
        lambda _: {
            "prompt": "a cat",
            "guidance_scale": 7.0,
            "guidance_schedule": None,
            "max_sequence_length": 12,
            **_SIZE,
        },
    ),
)
