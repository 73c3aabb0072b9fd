"""Wan: 9 frames, which are 3 x 16 tokens; 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMapEulerDiscreteScheduler, HeliosScheduler, UniPCMultistepScheduler

from tools.pipelines.case import Case
from tools.pipelines.encoders import clip_vision
from tools.pipelines.parts import (
    clip,
    left_half,
    picture,
    pipeline,
    prompts,
    transformer,
)
from tools.pipelines.vaes import wan22_vae, wan_vae

# A picture's latents and its mask lie beside the noise; Wan 2.1 reads its embeddings too, and
# takes the first 512 tokens of the condition for text.
_BESIDE = {"in_channels": 16 + 4 + 16}
_SEEN = {**_BESIDE, "image_dim": 20, "added_kv_proj_dim": 48}


def _expert(seed: int = 0, name: str = "WanTransformer3DModel", **config: Any) -> Any:
    return transformer(name, seed=seed, **{"in_channels": 16, "out_channels": 16, **config})


def _wan(name: str = "WanPipeline", **components: Any) -> Any:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return pipeline(
        name,
        **{"transformer": _expert(), "vae": wan_vae(), "scheduler": scheduler, **components},
    )


def experts(name: str = "WanPipeline", **config: Any) -> Any:
    """Wan 2.2: an expert for each end of the noise."""
    return _wan(
        name,
        transformer=_expert(**config),
        transformer_2=_expert(seed=1, **config),
        boundary_ratio=0.875,
    )


def _five_billion(name: str = "WanPipeline") -> Any:
    """Wan 2.2 5B: a timestep per token, and latents that are 16 times smaller."""
    return _wan(name, vae=wan22_vae(), expand_timesteps=True)


def _inputs(size: int = 64, text: int = 12, **more: Any) -> dict[str, Any]:
    return {
        **prompts(text),
        "height": size,
        "width": size,
        "num_frames": 9,
        "output_type": "pt",
        **more,
    }


def _filmed(**more: Any) -> dict[str, Any]:
    """The inputs of a pipeline whose video is as long as the one it is given."""
    inputs = _inputs(video=clip(), **more)
    del inputs["num_frames"]
    return inputs


CASES = (
    Case("WanPipeline", _wan, lambda _: _inputs()),
    Case("WanPipeline, two experts", experts, lambda _: _inputs(guidance_scale_2=3.0)),
    Case("WanPipeline, 5B", _five_billion, lambda _: _inputs(128)),
    Case(
        "WanImageToVideoPipeline",
        lambda: _wan("WanImageToVideoPipeline", transformer=_expert(**_SEEN), **clip_vision()),
        lambda _: _inputs(text=512, image=picture(64, 64)),
    ),
    Case(
        "WanImageToVideoPipeline, two experts",
        lambda: experts("WanImageToVideoPipeline", **_BESIDE),
        lambda _: _inputs(
            image=picture(64, 64), last_image=picture(64, 64, seed=1), guidance_scale_2=3.0
        ),
    ),
    Case(
        "WanImageToVideoPipeline, 5B",
        lambda: _five_billion("WanImageToVideoPipeline"),
        lambda _: _inputs(128, image=picture(128, 128)),
    ),
    Case(
        "WanVideoToVideoPipeline",
        lambda: _wan("WanVideoToVideoPipeline"),
        lambda _: _filmed(strength=0.7),
    ),
    Case(
        "WanVACEPipeline",
        lambda: _wan(
            "WanVACEPipeline",
            transformer=_expert(name="WanVACETransformer3DModel", vace_in_channels=96),
        ),
        lambda _: _inputs(
            video=clip(), mask=[left_half(64, 64)] * 9, reference_images=[picture(64, 64, seed=9)]
        ),
    ),
    Case(
        "LucyEditPipeline",
        lambda: _wan(
            "LucyEditPipeline", transformer=_expert(in_channels=32), expand_timesteps=True
        ),
        lambda _: _inputs(video=clip()),
    ),
    Case(
        "ChronoEditPipeline",
        lambda: _wan(
            "ChronoEditPipeline",
            transformer=_expert(name="ChronoEditTransformer3DModel", **_SEEN),
            **clip_vision(),
        ),
        lambda _: _inputs(text=512, image=picture(64, 64)),
    ),
    Case(
        "AnyFlowPipeline",
        lambda: _wan(
            "AnyFlowPipeline",
            transformer=_expert(name="AnyFlowTransformer3DModel"),
            scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        ),
        lambda _: _inputs(guidance_scale=3.0),
        known="called at other timesteps than its scheduler lists, and full there",
    ),
    Case(
        "AnyFlowFARPipeline",
        lambda: _wan(
            "AnyFlowFARPipeline",
            transformer=_expert(name="AnyFlowFARTransformer3DModel"),
            scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        ),
        lambda _: _inputs(guidance_scale=3.0, chunk_partition=[1, 2]),
        known="refused: it writes to keys and values that its caller keeps",
    ),
    Case(
        "HeliosPipeline",
        lambda: _wan(
            "HeliosPipeline",
            transformer=_expert(name="HeliosTransformer3DModel"),
            scheduler=HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1),
        ),
        lambda _: _inputs(num_frames=18, num_latent_frames_per_chunk=3),
        known="called at other timesteps than its scheduler lists, and full there",
    ),
    Case(
        "WanAnimatePipeline, two segments",
        lambda: _wan(
            "WanAnimatePipeline",
            transformer=_expert(
                name="WanAnimateTransformer3DModel", in_channels=36, latent_channels=16
            ),
            **clip_vision(),
        ),
        lambda _: {
            **prompts(512),
            "image": picture(64, 64),
            "pose_video": clip(17),
            "face_video": clip(17, 16, 16, seed=1),
            "segment_frame_length": 9,
            "guidance_scale": 3.0,
            "height": 64,
            "width": 64,
            "output_type": "pt",
        },
    ),
)
