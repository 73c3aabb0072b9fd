"""Cosmos: 9 frames of 64 x 64 pixels, which are 3 x 16 tokens; 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import picture, pipeline, prompts, transformer
from tools.pipelines.vaes import cosmos_vae, wan_vae


class _Trusting:
    """A safety checker that finds nothing; the real one is a model of its own."""

    def to(self, *_: object) -> None:
        """Nothing to move."""

    def check_text_safety(self, _: str) -> bool:
        """Every text is safe."""
        return True

    def check_video_safety(self, video: Any) -> Any:
        """Every video is safe."""
        return video


def _cosmos(name: str, scheduler: Any, vae: Any, channels: int = 16, beside: int = 0) -> Any:
    """``beside``: channels of the condition, which lie beside the noise."""
    return pipeline(
        name,
        transformer=transformer(
            "CosmosTransformer3DModel", in_channels=channels + beside, out_channels=channels
        ),
        vae=vae,
        scheduler=scheduler,
        safety_checker=_Trusting(),
    )


def _euler() -> Any:
    return EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )


def _flow() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)


def _inputs(**more: Any) -> dict[str, Any]:
    return {**prompts(), "height": 64, "width": 64, "output_type": "pt", **more}


CASES = (
    Case(
        "CosmosTextToWorldPipeline",
        lambda: _cosmos("CosmosTextToWorldPipeline", _euler(), cosmos_vae()),
        lambda _: _inputs(num_frames=9),
    ),
    Case(
        "CosmosVideoToWorldPipeline",
        lambda: _cosmos("CosmosVideoToWorldPipeline", _euler(), cosmos_vae(), beside=1),
        lambda _: _inputs(num_frames=9, image=picture(64, 64)),
    ),
    Case(
        "Cosmos2TextToImagePipeline",
        lambda: _cosmos("Cosmos2TextToImagePipeline", _flow(), wan_vae()),
        lambda _: _inputs(),
    ),
    Case(
        "Cosmos2VideoToWorldPipeline",
        lambda: _cosmos("Cosmos2VideoToWorldPipeline", _flow(), wan_vae(), beside=1),
        lambda _: _inputs(num_frames=9, image=picture(64, 64)),
    ),
)
