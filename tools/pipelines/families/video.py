"""Other pipelines of videos, and of sound: at least 2 x 16 tokens, 12 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tools.pipelines.case import Case
from tools.pipelines.parts import masks, normal, picture, pipeline, prompts, transformer
from tools.pipelines.vaes import (
    allegro_vae,
    cogvideo_vae,
    hunyuan_video_vae,
    image_vae,
    ltx_vae,
    mochi_vae,
)

_FRAMES = {"num_frames": 9, "output_type": "pt"}
_SMALL = {**_FRAMES, "height": 32, "width": 32}
_LARGE = {**_FRAMES, "height": 64, "width": 96}


def _video(name: str, model: str, vae: Any, scheduler: Any = None, **config: Any) -> Any:
    return pipeline(
        name,
        transformer=transformer(model, **config),
        vae=vae,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
    )


def _ltx(name: str) -> Any:
    return _video(name, "LTXVideoTransformer3DModel", ltx_vae())


def _hunyuan_text() -> dict[str, Any]:
    text = {**prompts(), **masks()}
    return {**text, "pooled_prompt_embeds": normal(1, 16, seed=2)}


def _kandinsky_text() -> dict[str, Any]:
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
        "LTXPipeline",
        lambda: _ltx("LTXPipeline"),
        lambda _: {**prompts(), **masks(), **_SMALL},
    ),
    Case(
        "LTXImageToVideoPipeline",
        lambda: _ltx("LTXImageToVideoPipeline"),
        lambda _: {**prompts(), **masks(), "image": picture(), **_SMALL},
    ),
    Case(
        "HunyuanVideoPipeline",
        lambda: _video(
            "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", hunyuan_video_vae()
        ),
        lambda _: {**_hunyuan_text(), **_LARGE},
    ),
    Case(
        "HunyuanVideoPipeline, true CFG",
        lambda: _video(
            "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", hunyuan_video_vae()
        ),
        lambda _: {
            **_hunyuan_text(),
            "negative_pooled_prompt_embeds": normal(1, 16, seed=3),
            "true_cfg_scale": 3.0,
            **_LARGE,
        },
    ),
    Case(
        "LattePipeline",
        lambda: _video("LattePipeline", "LatteTransformer3DModel", image_vae(), DDIMScheduler()),
        lambda _: {
            **prompts(),
            "negative_prompt": None,
            "video_length": 4,
            "height": 24,
            "width": 24,
            "mask_feature": False,
            "clean_caption": False,
            "output_type": "pt",
        },
    ),
    Case(
        "AllegroPipeline",
        lambda: _video(
            "AllegroPipeline",
            "AllegroTransformer3DModel",
            allegro_vae(),
            EulerAncestralDiscreteScheduler(),
        ),
        lambda _: {
            **prompts(),
            **masks(),
            "negative_prompt": None,
            "num_frames": 8,
            "height": 64,
            "width": 64,
            "output_type": "pt",
            "clean_caption": False,
        },
    ),
    Case(
        "CogVideoXPipeline",
        lambda: _video(
            "CogVideoXPipeline",
            "CogVideoXTransformer3DModel",
            cogvideo_vae(),
            CogVideoXDDIMScheduler(),
        ),
        lambda _: {**prompts(), **_LARGE},
    ),
    Case(
        "CogVideoXImageToVideoPipeline",
        lambda: _video(
            "CogVideoXImageToVideoPipeline",
            "CogVideoXTransformer3DModel",
            cogvideo_vae(),
            CogVideoXDDIMScheduler(),
            in_channels=8,
        ),
        lambda _: {**prompts(), "image": picture(96, 64), **_LARGE},
    ),
    Case(
        "MochiPipeline",
        lambda: _video("MochiPipeline", "MochiTransformer3DModel", mochi_vae(), in_channels=12),
        lambda _: {**prompts(), **masks(dtype=torch.bool), **_LARGE, "num_frames": 13},
    ),
    Case(
        "Kandinsky5T2VPipeline",
        lambda: _video(
            "Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", hunyuan_video_vae()
        ),
        lambda _: {**_kandinsky_text(), **_LARGE},
    ),
)
