"""Pipelines of sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableAudioProjectionModel,
)
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

from tools.pipelines.case import Case
from tools.pipelines.encoders import tokenizer, umt5
from tools.pipelines.parts import masks, normal, pipeline, prompts, seeded, transformer
from tools.pipelines.vaes import longcat_vae, oobleck_vae, same_vae


def _stable_audio() -> Any:
    """Its usual scheduler, CosineDPMSolverMultistep, needs the package torchsde."""
    return pipeline(
        "StableAudioPipeline",
        transformer=transformer("StableAudioDiTModel", global_states_input_dim=48),
        vae=oobleck_vae(),
        projection_model=seeded(
            lambda: StableAudioProjectionModel(
                text_encoder_dim=24, conditioning_dim=24, min_value=0, max_value=32
            )
        ),
        scheduler=EDMDPMSolverMultistepScheduler(solver_order=2, sigma_schedule="exponential"),
    )


def _stable_audio3(name: str = "StableAudio3Pipeline") -> Any:
    return pipeline(
        name,
        transformer=transformer("StableAudio3DiTModel", global_cond_dim=24),
        vae=same_vae(),
        duration_embedder=seeded(lambda: StableAudio3DurationEmbedder(24, 32)),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def _sounding() -> dict[str, Any]:
    """A prompt, and 32 s of noise that is to be changed."""
    return {
        "prompt_embeds": normal(1, 12, 24),
        "encoder_attention_mask": torch.ones(1, 12, dtype=torch.long),
        "duration": 32.0,
        "audio": normal(1, 2, 512, seed=1),
        "output_type": "pt",
    }


def _longcat() -> Any:
    return pipeline(
        "LongCatAudioDiTPipeline",
        transformer=transformer("LongCatAudioDiTTransformer"),
        vae=longcat_vae(),
        text_encoder=umt5(),
        tokenizer=tokenizer(),
    )


CASES = (
    Case(
        "StableAudioPipeline",
        _stable_audio,
        lambda _: {
            **prompts(),
            "attention_mask": torch.ones(1, 12, dtype=torch.long),
            "negative_attention_mask": torch.ones(1, 12, dtype=torch.long),
            "audio_end_in_s": 20.0,
            "output_type": "pt",
        },
    ),
    Case(
        "StableAudio3Pipeline",
        _stable_audio3,
        lambda _: {
            **prompts(),
            **masks(name="encoder_attention_mask"),
            "guidance_scale": 4.0,
            "duration": 32.0,
            "output_type": "pt",
        },
    ),
    Case(
        "LongCatAudioDiTPipeline",
        _longcat,
        lambda _: {
            "prompt": "rain on a roof",
            "negative_prompt": "noise",
            "audio_duration_s": 32.0,
            "output_type": "pt",
        },
        known="called at other timesteps than its scheduler lists, and full there",
    ),
    Case(
        "StableAudio3AudioToAudioPipeline",
        lambda: _stable_audio3("StableAudio3AudioToAudioPipeline"),
        lambda _: {**_sounding(), "init_noise_level": 0.6},
    ),
    Case(
        "StableAudio3InpaintPipeline",
        lambda: _stable_audio3("StableAudio3InpaintPipeline"),
        lambda _: {**_sounding(), "mask_start_seconds": 8.0, "mask_end_seconds": 24.0},
    ),
)
