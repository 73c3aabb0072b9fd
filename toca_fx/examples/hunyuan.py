"""Tiny models of the Hunyuan family, images and video: depth 2 to 4, 80 or 72 tokens."""

from __future__ import annotations

import torch

from toca_fx.examples.example import HEADS, Example, grid, rotary, text_to_video

_BLOCKS = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "text_embed_dim": 24,
    "rope_axes_dim": (4, 6, 6),
}
_VIDEO = {**_BLOCKS, "num_refiner_layers": 1}

EXAMPLES = (
    Example(
        "HunyuanDiT2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 48,
            "num_layers": 4,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 16,
            "text_len": 8,
            "text_len_t5": 12,
        },
        lambda d: {
            "hidden_states": d.normal(4, 16, 20),
            "timestep": d.full(500.0),
            "encoder_hidden_states": d.normal(8, 24),
            "text_embedding_mask": d.mask(8),
            "encoder_hidden_states_t5": d.normal(12, 16),
            "text_embedding_mask_t5": d.mask(12),
            "image_meta_size": d.full(256.0, 6),
            "style": d.full(0),
            "image_rotary_emb": rotary(grid(8, 10), 16),
        },
    ),
    Example(
        "HunyuanImageTransformer2DModel",
        {
            **HEADS,
            "num_layers": 2,
            "num_single_layers": 2,
            "in_channels": 8,
            "out_channels": 8,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "text_embed_2_dim": 20,
            "rope_axes_dim": (8, 8),
        },
        lambda d: {
            "hidden_states": d.normal(8, 8, 10),
            "timestep": d.full(500.0),
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_attention_mask": d.mask(12),
            "encoder_hidden_states_2": d.normal(8, 20),
            "encoder_attention_mask_2": d.mask(8),
        },
    ),
    Example(
        "HunyuanVideoTransformer3DModel",
        {**_VIDEO, "pooled_projection_dim": 16},
        lambda d: {
            **text_to_video(d),
            "encoder_attention_mask": d.mask(12),
            "pooled_projections": d.normal(16),
            "guidance": d.full(6000.0),
        },
    ),
    Example(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **_VIDEO,
            "pooled_projection_dim": 16,
            "has_image_proj": True,
            "image_proj_dim": 20,
            "has_clean_x_embedder": True,
        },
        lambda d: {
            **text_to_video(d),
            "encoder_attention_mask": d.mask(12),
            "pooled_projections": d.normal(16),
            "guidance": d.full(6000.0),
            "image_embeds": d.normal(6, 20),
            "indices_latents": torch.arange(8, 11),
            "latents_clean": d.normal(4, 2, 8, 12),
            "indices_latents_clean": torch.tensor([0, 7]),
            "latents_history_2x": d.normal(4, 2, 8, 12),
            "indices_latents_history_2x": torch.arange(5, 7),
            "latents_history_4x": d.normal(4, 4, 8, 12),
            "indices_latents_history_4x": torch.arange(1, 5),
        },
    ),
    Example(
        "HunyuanVideo15Transformer3DModel",
        {
            **HEADS,
            "in_channels": 9,
            "out_channels": 4,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 24,
            "text_embed_2_dim": 20,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda d: {
            "hidden_states": d.normal(9, 3, 4, 6),
            "timestep": d.full(500.0),
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_attention_mask": d.mask(12),
            "encoder_hidden_states_2": d.normal(8, 20),
            "encoder_attention_mask_2": d.mask(8),
            "image_embeds": d.normal(6, 16),
        },
    ),
    Example(
        "MotifVideoTransformer3DModel",
        {
            **_BLOCKS,
            "in_channels": 9,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "image_embed_dim": 20,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        lambda d: {
            **text_to_video(d, 500.0, 9),
            "encoder_attention_mask": d.mask(12),
            "image_embeds": d.normal(6, 20),
        },
    ),
)
