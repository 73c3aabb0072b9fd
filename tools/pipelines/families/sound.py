"""Pipelines of sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EDMDPMSolverMultistepScheduler, StableAudioProjectionModel

from tools.pipelines.case import Case
from tools.pipelines.parts import pipeline, prompts, seeded, transformer
from tools.pipelines.vaes import oobleck_vae


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
)
