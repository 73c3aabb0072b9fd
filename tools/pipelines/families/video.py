"""Other pipelines of videos, and of sound: at least 2 x 16 tokens, 12 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tools.pipelines.case import Case
from tools.pipelines.parts import clip, masks, normal, picture, pipeline, prompts, transformer
from tools.pipelines.vaes import (
    allegro_vae,
    cogvideo_vae,
    image_vae,
    ltx_vae,
    magvit_vae,
    mochi_vae,
    wan_vae,
)

_FRAMES = {"num_frames": 9, "output_type": "pt"}
_SMALL = {**_FRAMES, "height": 32, "width": 32}
_LARGE = {**_FRAMES, "height": 64, "width": 96}


def _video(
    name: str, model: str, vae: Any, scheduler: Any = None, guider: Any = None, **config: Any
) -> Any:
    guided = {"guider": guider} if guider else {}
    return pipeline(
        name,
        transformer=transformer(model, **config),
        vae=vae,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        **guided,
    )


def _ltx(name: str) -> Any:
    return _video(name, "LTXVideoTransformer3DModel", ltx_vae())


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
        "LTXConditionPipeline",
        lambda: _ltx("LTXConditionPipeline"),
        lambda _: {**prompts(), **masks(), "image": picture(), **_SMALL},
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
        "CogVideoXVideoToVideoPipeline",
        lambda: _video(
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXTransformer3DModel",
            cogvideo_vae(),
            CogVideoXDDIMScheduler(),
        ),
        lambda _: {
            **prompts(),
            "video": clip(width=96),
            "strength": 0.7,
            "height": 64,
            "width": 96,
            "output_type": "pt",
        },
    ),
    Case(
        "CogVideoXFunControlPipeline",
        lambda: _video(
            "CogVideoXFunControlPipeline",
            "CogVideoXTransformer3DModel",
            cogvideo_vae(),
            CogVideoXDDIMScheduler(),
            in_channels=8,
        ),
        lambda _: {
            **prompts(),
            "control_video": clip(width=96),
            "height": 64,
            "width": 96,
            "output_type": "pt",
        },
    ),
    Case(
        "EasyAnimatePipeline",
        lambda: _video("EasyAnimatePipeline", "EasyAnimateTransformer3DModel", magvit_vae()),
        lambda _: {**prompts(), **masks(), **_LARGE},
    ),
    Case(
        "MotifVideoPipeline",
        lambda: _video(
            "MotifVideoPipeline",
            "MotifVideoTransformer3DModel",
            wan_vae(),
            guider=ClassifierFreeGuidance(guidance_scale=5.0),
            in_channels=33,
            out_channels=16,
        ),
        lambda _: {**prompts(), **masks(), **_LARGE},
    ),
    Case(
        "EasyAnimateInpaintPipeline",
        lambda: _video(
            "EasyAnimateInpaintPipeline",
            "EasyAnimateTransformer3DModel",
            magvit_vae(),
            in_channels=9,
        ),
        lambda _: {
            **prompts(),
            **masks(),
            **_LARGE,
            "video": normal(1, 3, 9, 64, 96).sigmoid(),
            "mask_video": 255 * torch.ones(1, 1, 9, 64, 96),
        },
    ),
)
