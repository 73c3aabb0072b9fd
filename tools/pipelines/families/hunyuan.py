"""Hunyuan's videos and images: 24 tokens a frame, 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
)

from tools.pipelines.case import Case
from tools.pipelines.encoders import siglip_vision
from tools.pipelines.parts import masks, normal, picture, pipeline, prompts, transformer
from tools.pipelines.vaes import hunyuan_image_vae, hunyuan_video15_vae, hunyuan_video_vae

_IMAGE = {"height": 64, "width": 96, "output_type": "pt"}
_VIDEO = {**_IMAGE, "num_frames": 9}


def _video(
    name: str, cls: str = "HunyuanVideoTransformer3DModel", vae: Any = None, **more: Any
) -> Any:
    """``more``: components by their names; what else there is changes the transformer."""
    given = ("guider", "image_encoder", "feature_extractor")
    components = {key: more.pop(key) for key in given if key in more}
    return pipeline(
        name,
        transformer=transformer(cls, **more),
        vae=vae or hunyuan_video_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **components,
    )


def _text() -> dict[str, Any]:
    return {**prompts(), **masks(), "pooled_prompt_embeds": normal(1, 16, seed=2)}


def _guided() -> dict[str, Any]:
    return {
        **_text(),
        "negative_pooled_prompt_embeds": normal(1, 16, seed=3),
        "true_cfg_scale": 3.0,
    }


def _two_encoders() -> dict[str, Any]:
    """The embeddings of two text encoders: 12 tokens of 24 channels, 8 of 20."""
    second = {**prompts(8, 20), **masks(8, name="prompt_embeds_mask")}
    return {
        **prompts(),
        **masks(name="prompt_embeds_mask"),
        **{f"{name}_2": value for name, value in second.items()},
    }


_PIECES = "captured in several graphs, with a warning: values of its masks decide on shapes"

CASES = (
    Case(
        "HunyuanVideoPipeline",
        lambda: _video("HunyuanVideoPipeline"),
        lambda _: {**_text(), **_VIDEO},
    ),
    Case(
        "HunyuanVideoPipeline, true CFG",
        lambda: _video("HunyuanVideoPipeline"),
        lambda _: {**_guided(), **_VIDEO},
    ),
    Case(
        "HunyuanVideoImageToVideoPipeline",
        lambda: _video(
            "HunyuanVideoImageToVideoPipeline",
            in_channels=9,
            image_condition_type="latent_concat",
        ),
        lambda _: {**_guided(), **_VIDEO, "image": picture(96, 64)},
    ),
    Case(
        "HunyuanSkyreelsImageToVideoPipeline",
        lambda: _video("HunyuanSkyreelsImageToVideoPipeline", in_channels=8),
        lambda _: {**_guided(), **_VIDEO, "image": picture(96, 64)},
    ),
    Case(
        "HunyuanVideoFramepackPipeline, two sections",
        lambda: _video(
            "HunyuanVideoFramepackPipeline",
            "HunyuanVideoFramepackTransformer3DModel",
            **siglip_vision(),
        ),
        lambda _: {
            **_text(),
            **_VIDEO,
            "num_frames": 18,
            "latent_window_size": 3,
            "image": picture(96, 64),
        },
    ),
    Case(
        "HunyuanVideo15Pipeline",
        lambda: _video(
            "HunyuanVideo15Pipeline",
            "HunyuanVideo15Transformer3DModel",
            hunyuan_video15_vae(),
            guider=ClassifierFreeGuidance(guidance_scale=5.0),
        ),
        lambda _: {**_two_encoders(), **_VIDEO},
        known=_PIECES,
    ),
    Case(
        "HunyuanImagePipeline",
        lambda: _video(
            "HunyuanImagePipeline",
            "HunyuanImageTransformer2DModel",
            hunyuan_image_vae(),
            guider=AdaptiveProjectedMixGuidance(guidance_scale=3.5),
        ),
        lambda _: {**_two_encoders(), **_IMAGE},
        known=f"{_PIECES}; some of them know no timestep, and end no run before the VAE decodes",
    ),
    Case(
        "HunyuanVideo15ImageToVideoPipeline",
        lambda: _video(
            "HunyuanVideo15ImageToVideoPipeline",
            "HunyuanVideo15Transformer3DModel",
            hunyuan_video15_vae(),
            guider=ClassifierFreeGuidance(guidance_scale=5.0),
            image_embed_dim=20,
            target_size=64,
            **siglip_vision(),
        ),
        lambda _: {
            **_two_encoders(),
            "num_frames": 9,
            "image": picture(96, 64),
            "output_type": "pt",
        },
        known=_PIECES,
    ),
)
