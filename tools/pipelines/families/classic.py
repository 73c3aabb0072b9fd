"""DiT and PixArt, the first diffusion transformers: 64 image tokens of 32 x 32 pixels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from tools.pipelines.case import Case
from tools.pipelines.parts import normal, pipeline, transformer
from tools.pipelines.vaes import image_vae


def _pixart(name: str, **components: Any) -> Any:
    return pipeline(
        name,
        transformer=transformer("PixArtTransformer2DModel"),
        vae=image_vae(),
        scheduler=DPMSolverMultistepScheduler(),
        **components,
    )


def _text() -> dict[str, Any]:
    """Embeddings of 12 tokens, two of the prompt's being padding."""
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, -2:] = 0
    return {
        "prompt_embeds": normal(1, 12, 24),
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": normal(1, 12, 24, seed=1),
        "negative_prompt_attention_mask": torch.ones_like(mask),
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "output_type": "pt",
    }


CASES = (
    Case(
        "DiTPipeline",
        lambda: pipeline(
            "DiTPipeline",
            transformer=transformer("DiTTransformer2DModel", num_embeds_ada_norm=1000),
            vae=image_vae(),
            scheduler=DDIMScheduler(),
        ),
        lambda _: {"class_labels": [207], "output_type": "np"},
    ),
    Case("PixArtAlphaPipeline", lambda: _pixart("PixArtAlphaPipeline"), lambda _: _text()),
    Case("PixArtSigmaPipeline", lambda: _pixart("PixArtSigmaPipeline"), lambda _: _text()),
    Case(
        "PixArtSigmaPAGPipeline",
        lambda: _pixart("PixArtSigmaPAGPipeline", pag_applied_layers=["blocks.1"]),
        lambda _: _text(),
    ),
)
