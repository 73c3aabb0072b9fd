"""Tiny encoders of pictures and texts, where a pipeline takes no embeddings."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tools.pipelines.parts import seeded


def clip_vision(width: int = 20) -> dict[str, Any]:
    """A CLIP that sees 12 x 12 pixels as 10 tokens of ``width``, and what prepares its pictures."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    return {
        "image_encoder": seeded(lambda: CLIPVisionModel(config)),
        "image_processor": CLIPImageProcessor(size=12, crop_size=12),
    }


def siglip_vision(width: int = 20) -> dict[str, Any]:
    """A SigLIP that sees 12 x 12 pixels as 9 tokens of ``width``, and what prepares them."""
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    return {
        "image_encoder": seeded(lambda: SiglipVisionModel(config)),
        "feature_extractor": SiglipImageProcessor(size={"height": 12, "width": 12}),
    }
