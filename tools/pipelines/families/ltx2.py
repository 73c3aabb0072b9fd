"""LTX 2, video and sound: 3 x 256 tokens of video, 12 of text; up to four calls a step."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from tools.pipelines.case import Case
from tools.pipelines.parts import masks, picture, pipeline, prompts, seeded, transformer
from tools.pipelines.vaes import ltx2_audio_vae, ltx2_vae

# What the connectors make of the text, and what the transformer reads: 4 heads of 8 channels.
_TEXT = 32


def _ltx2(name: str) -> Any:
    return pipeline(
        name,
        transformer=transformer(
            "LTX2VideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            audio_in_channels=4,
            audio_out_channels=4,
            caption_channels=_TEXT,
        ),
        connectors=seeded(_connectors),
        vae=ltx2_vae(),
        audio_vae=ltx2_audio_vae(),
        vocoder=seeded(_vocoder),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _connectors() -> Any:
    heads = {}
    for stream in ("video", "audio"):
        heads |= {
            f"{stream}_connector_num_attention_heads": 4,
            f"{stream}_connector_attention_head_dim": 8,
            f"{stream}_connector_num_layers": 1,
            f"{stream}_connector_num_learnable_registers": None,
        }
    return LTX2TextConnectors(
        caption_channels=_TEXT,
        text_proj_in_factor=3,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **heads,
    )


def _vocoder() -> Any:
    return LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )


def _inputs(**more: Any) -> dict[str, Any]:
    """The embeddings are those of three layers of the text encoder, side by side."""
    return {
        **prompts(12, 3 * _TEXT),
        **masks(),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "frame_rate": 25.0,
        "output_type": "pt",
        **more,
    }


_GUIDED_BY_TEXT = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
}

CASES = (
    Case(
        "LTX2Pipeline",
        lambda: _ltx2("LTX2Pipeline"),
        lambda _: _inputs(**_GUIDED_BY_TEXT),
    ),
    Case(
        "LTX2Pipeline, STG and modality guidance",
        lambda: _ltx2("LTX2Pipeline"),
        lambda _: _inputs(spatio_temporal_guidance_blocks=[1]),
    ),
    Case(
        "LTX2ImageToVideoPipeline",
        lambda: _ltx2("LTX2ImageToVideoPipeline"),
        lambda _: _inputs(**_GUIDED_BY_TEXT, image=picture(), image_crf=0),
    ),
    Case(
        "LTX2ConditionPipeline",
        lambda: _ltx2("LTX2ConditionPipeline"),
        lambda _: _inputs(
            **_GUIDED_BY_TEXT, conditions=LTX2VideoCondition(frames=picture(), crf=0)
        ),
    ),
)
