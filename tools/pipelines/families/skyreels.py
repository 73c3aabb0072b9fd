"""SkyReels V2, on Wan's autoencoder: 9 frames of 64 x 64 pixels, which are 3 x 16 tokens."""

from __future__ import annotations

from typing import Any

from diffusers import UniPCMultistepScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import pipeline, prompts, transformer
from tools.pipelines.vaes import wan_vae


def _skyreels(name: str) -> Any:
    return pipeline(
        name,
        transformer=transformer("SkyReelsV2Transformer3DModel", in_channels=16, out_channels=16),
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
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
)
