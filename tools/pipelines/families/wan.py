"""Wan: 9 frames of 64 x 64 pixels, which are 3 x 16 tokens; 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import UniPCMultistepScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import normal, pipeline, transformer
from tools.pipelines.vaes import wan_vae


def _expert(seed: int = 0, **config: Any) -> Any:
    return transformer(
        "WanTransformer3DModel", seed=seed, **{"in_channels": 16, "out_channels": 16, **config}
    )


def _scheduler() -> Any:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _wan(name: str = "WanPipeline", **components: Any) -> Any:
    return pipeline(
        name,
        **{
            "transformer": _expert(),
            "vae": wan_vae(),
            "scheduler": _scheduler(),
            **components,
        },
    )


def _inputs() -> dict[str, Any]:
    return {
        "prompt_embeds": normal(1, 12, 24),
        "negative_prompt_embeds": normal(1, 12, 24, seed=1),
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "output_type": "pt",
    }


CASES = (
    Case("WanPipeline", _wan, lambda _: _inputs()),
    Case(
        "WanPipeline, two experts",
        lambda: _wan(transformer_2=_expert(seed=1), boundary_ratio=0.875),
        lambda _: {**_inputs(), "guidance_scale_2": 3.0},
    ),
)
