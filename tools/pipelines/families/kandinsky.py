"""Kandinsky 5: 24 tokens a frame, 12 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import normal, picture, pipeline, transformer
from tools.pipelines.vaes import hunyuan_video_vae, image_vae

_SIZE = {"height": 64, "width": 96, "output_type": "pt"}


def _kandinsky(name: str, vae: Any, **config: Any) -> Any:
    pipe = pipeline(
        name,
        transformer=transformer("Kandinsky5Transformer3DModel", **config),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    # Those of images have a list of sizes, all of them large.
    pipe.resolutions = [(96, 64)]
    return pipe


def _text() -> dict[str, Any]:
    """The embeddings of two text encoders, and where each prompt ends."""
    ends = torch.tensor([0, 12], dtype=torch.int32)
    return {
        "prompt_embeds_qwen": normal(1, 12, 24),
        "prompt_embeds_clip": normal(1, 20, seed=1),
        "prompt_cu_seqlens": ends,
        "negative_prompt_embeds_qwen": normal(1, 12, 24, seed=2),
        "negative_prompt_embeds_clip": normal(1, 20, seed=3),
        "negative_prompt_cu_seqlens": ends,
    }


CASES = (
    Case(
        "Kandinsky5T2VPipeline",
        lambda: _kandinsky("Kandinsky5T2VPipeline", hunyuan_video_vae()),
        lambda _: {**_text(), **_SIZE, "num_frames": 9},
    ),
    Case(
        "Kandinsky5I2VPipeline",
        lambda: _kandinsky("Kandinsky5I2VPipeline", hunyuan_video_vae(), visual_cond=True),
        # Four latent frames are normalised by the others.
        lambda _: {**_text(), **_SIZE, "num_frames": 25, "image": picture(96, 64)},
    ),
    Case(
        "Kandinsky5T2IPipeline",
        lambda: _kandinsky("Kandinsky5T2IPipeline", image_vae(factor=8)),
        lambda _: {**_text(), **_SIZE},
    ),
    Case(
        "Kandinsky5I2IPipeline",
        lambda: _kandinsky("Kandinsky5I2IPipeline", image_vae(factor=8), visual_cond=True),
        lambda _: {**_text(), **_SIZE, "image": picture(96, 64)},
    ),
)
