"""Tiny image models on packed tokens, Flux and the like: 80 image tokens and 12 of text."""

from __future__ import annotations

from typing import Any

import torch

from toca_fx.examples.example import HEADS, Draw, Example, grid

_FLUX = {
    **HEADS,
    "num_layers": 2,
    "num_single_layers": 2,
    "in_channels": 16,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def _packed(d: Draw, time: float = 0.5, axes: int = 3) -> dict[str, Any]:
    """8 x 10 packed image tokens and 12 text tokens with their positions, as Flux takes them."""
    positions = torch.zeros(80, axes)
    positions[:, 1:3] = grid(8, 10)
    return {
        "hidden_states": d.normal(80, 16),
        "encoder_hidden_states": d.normal(12, 24),
        "timestep": d.full(time),
        "img_ids": positions,
        "txt_ids": torch.zeros(12, axes),
    }


EXAMPLES = (
    Example(
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 24, "guidance_embeds": True},
        lambda d: {**_packed(d), "pooled_projections": d.normal(24), "guidance": d.full(3.5)},
    ),
    Example(
        "QwenImageTransformer2DModel",
        {
            **HEADS,
            "num_layers": 2,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda d: {
            "hidden_states": d.normal(80, 16),
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_hidden_states_mask": d.mask(12),
            "timestep": d.full(0.5),
            "img_shapes": [[(1, 8, 10)]] * d.batch,
        },
    ),
    Example(
        "BriaTransformer2DModel",
        _FLUX,
        lambda d: _packed(d, 500.0),
    ),
    Example(
        "BriaFiboTransformer2DModel",
        {**_FLUX, "text_encoder_dim": 20},
        lambda d: {
            **_packed(d, 500.0),
            "text_encoder_layers": [d.normal(12, 20) for _ in range(4)],
        },
    ),
    Example(
        "ChromaTransformer2DModel",
        {
            **_FLUX,
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        lambda d: {
            **_packed(d),
            "attention_mask": torch.cat([d.mask(12, torch.bool), d.full(1, 80).bool()], dim=1),
        },
    ),
    Example(
        "Flux2Transformer2DModel",
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        lambda d: {**_packed(d, axes=4), "guidance": d.full(4.0)},
    ),
    Example(
        "Flux3Transformer2DModel",
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "cond_in_channels": 16, "timestep_channels": 32},
        lambda d: _packed(d, axes=4),
    ),
    Example(
        "Ideogram4Transformer2DModel",
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 2,
            "intermediate_size": 128,
            "adaln_dim": 32,
            "llm_features_dim": 24,
            "mrope_section": (4, 2, 2),
        },
        lambda d: {
            "hidden_states": torch.cat([torch.zeros(d.batch, 12, 8), d.normal(80, 8)], dim=1),
            "timestep": d.full(0.5),
            "encoder_hidden_states": torch.cat(
                [d.normal(12, 24), torch.zeros(d.batch, 80, 24)], dim=1
            ),
            "position_ids": torch.cat([grid(12).expand(12, 3), 65536 + grid(1, 8, 10)])
            .long()
            .repeat(d.batch, 1, 1),
            "segment_ids": d.full(0, 92),
            "indicator": torch.cat([d.full(3, 12), d.full(2, 80)], dim=1),
        },
    ),
    Example(
        "Krea2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 168,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 24,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 64,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda d: {
            "hidden_states": d.normal(80, 16),
            "encoder_hidden_states": d.normal(12, 3, 24),
            "timestep": d.full(0.5),
            "position_ids": torch.cat([torch.zeros(12, 3), grid(1, 8, 10)]),
            "encoder_attention_mask": d.mask(12, torch.bool),
        },
    ),
    Example(
        "LongCatImageTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 24},
        _packed,
    ),
    Example(
        "NucleusMoEImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 48,
            "capacity_factors": 2.0,
        },
        lambda d: {
            "hidden_states": d.normal(80, 16),
            "img_shapes": [(1, 8, 10)] * d.batch,
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_hidden_states_mask": d.mask(12),
            "timestep": d.full(0.5),
        },
    ),
    Example("OvisImageTransformer2DModel", {**_FLUX, "out_channels": 16}, _packed),
    Example(
        "QwenImage21Transformer2DModel",
        {
            **HEADS,
            "num_layers": 2,
            "in_channels": 16,
            "out_channels": 16,
            "context_in_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda d: {
            "hidden_states": d.normal(80, 16),
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_hidden_states_mask": d.mask(12),
            "timestep": d.full(0.5),
            "img_shapes": [[(1, 8, 10)]] * d.batch,
            "img_mask": torch.cat([d.full(0, 12), d.full(1, 20)], dim=1).bool(),
        },
    ),
)
