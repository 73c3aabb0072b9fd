"""SkyReels V2, on Wan's autoencoder: 9 frames of 64 x 64 pixels, which are 3 x 16 tokens."""

from __future__ import annotations

from typing import Any

from diffusers import UniPCMultistepScheduler

from tools.pipelines.case import Case
from tools.pipelines.encoders import clip_vision
from tools.pipelines.parts import clip, picture, pipeline, prompts, transformer
from tools.pipelines.vaes import wan_vae


def _skyreels(name: str, config: dict[str, Any] | None = None, **components: Any) -> Any:
    return pipeline(
        name,
        transformer=transformer(
            "SkyReelsV2Transformer3DModel",
            **{"in_channels": 16, "out_channels": 16, **(config or {})},
        ),
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
        **components,
    )


def _inputs(**more: Any) -> dict[str, Any]:
    return {
        **prompts(),
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "output_type": "pt",
        **more,
    }


CASES = (
    Case("SkyReelsV2Pipeline", lambda: _skyreels("SkyReelsV2Pipeline"), lambda _: _inputs()),
    Case(
        "SkyReelsV2DiffusionForcingPipeline",
        lambda: _skyreels("SkyReelsV2DiffusionForcingPipeline"),
        lambda _: _inputs(prompt=None),
    ),
    Case(
        "SkyReelsV2DiffusionForcingPipeline, asynchronous",
        lambda: _skyreels("SkyReelsV2DiffusionForcingPipeline"),
        lambda _: _inputs(prompt=None, ar_step=3, causal_block_size=1),
        known="each frame is at a step of its own: more calls than the scheduler has steps",
    ),
    Case(
        "SkyReelsV2ImageToVideoPipeline",
        lambda: _skyreels(
            "SkyReelsV2ImageToVideoPipeline",
            {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 48},
            **clip_vision(),
        ),
        lambda _: {**_inputs(image=picture(64, 64)), **prompts(512)},
    ),
    Case(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        lambda: _skyreels("SkyReelsV2DiffusionForcingImageToVideoPipeline"),
        lambda _: _inputs(image=picture(64, 64)),
    ),
    Case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        lambda: _skyreels("SkyReelsV2DiffusionForcingVideoToVideoPipeline"),
        lambda _: _inputs(video=clip(), num_frames=17, overlap_history=5, base_num_frames=9),
    ),
)
