"""The other tiny image models: depth 2 to 4, 64 to 80 image tokens and fewer of text."""

from __future__ import annotations

from typing import Any

import torch

from toca_fx.examples.example import HEADS, Draw, Example, grid

_COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 24,
    "time_embed_dim": 32,
    "condition_dim": 8,
    "pos_embed_max_size": 16,
    "sample_size": 16,
}


def _text_to_image(d: Draw, time: float = 500, text: int = 24, channels: int = 4) -> dict[str, Any]:
    """Latents of 16 x 16, 12 text tokens and a timestep."""
    return {
        "hidden_states": d.normal(channels, 16, 16),
        "encoder_hidden_states": d.normal(12, text),
        "timestep": d.full(time),
    }


def _sizes(d: Draw) -> dict[str, Any]:
    """The sizes that CogView is conditioned on, in pixels."""
    return {
        "original_size": d.full(256.0, 2),
        "target_size": d.full(256.0, 2),
        "crop_coords": d.full(0.0, 2),
    }


EXAMPLES = (
    Example(
        "DiTTransformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 16,
            "num_embeds_ada_norm": 10,
            "norm_eps": 1e-6,
        },
        lambda d: {
            "hidden_states": d.normal(4, 16, 16),
            "timestep": d.full(500),
            "class_labels": d.whole(10),
        },
    ),
    Example(
        "PixArtTransformer2DModel",
        {
            **HEADS,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "sample_size": 16,
            "caption_channels": 24,
        },
        lambda d: {
            **_text_to_image(d),
            "encoder_attention_mask": d.mask(12),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    Example(
        "SD3Transformer2DModel",
        {
            **HEADS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 24,
            "caption_projection_dim": 48,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 24,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda d: {**_text_to_image(d, 500.0), "pooled_projections": d.normal(32)},
    ),
    Example(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 64,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": 24,
        },
        lambda d: {**_text_to_image(d, 0.5), "encoder_attention_mask": d.mask(12)},
    ),
    Example(
        "SanaTransformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 3,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 48,
            "caption_channels": 24,
            "sample_size": 8,
        },
        lambda d: {
            "hidden_states": d.normal(4, 8, 10),
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_attention_mask": d.mask(12),
            "timestep": d.full(500),
        },
    ),
    Example(
        "AuraFlowTransformer2DModel",
        {
            **HEADS,
            "sample_size": 16,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 48,
            "pos_embed_max_size": 256,
        },
        lambda d: _text_to_image(d, 0.5),
    ),
    Example(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 48,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "cap_feat_dim": 24,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 8,
            "max_num_gist_tokens": 16,
            "gist_step": 4,
            "gist_min_text_len": 8,
            "gist_max_text_len": 24,
            "axes_dims": (4, 6, 6),
            "axes_lens": (32, 32, 32),
        },
        lambda d: {
            "hidden_states": d.normal(4, 16, 20),
            "encoder_hidden_states": d.normal(2, 12, 24),
            "timestep": d.full(0.5),
        },
    ),
    Example(
        "CogView3PlusTransformer2DModel",
        {**HEADS, **_COGVIEW},
        lambda d: {**_text_to_image(d), **_sizes(d)},
    ),
    Example(
        "CogView4Transformer2DModel",
        {**HEADS, **_COGVIEW, "rope_axes_dim": (16, 16)},
        lambda d: {**_text_to_image(d), **_sizes(d)},
    ),
    Example(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_layers": 2,
            "ffn_hidden_size": 128,
            "in_channels": 8,
            "out_channels": 8,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda d: {
            "hidden_states": d.normal(8, 8, 10),
            "timestep": d.full(500.0),
            "text_bth": d.normal(12, 24),
            "text_lens": d.mask(12).sum(dim=1),
        },
    ),
    Example(
        "GlmImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 24,
            "time_embed_dim": 32,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 32,
        },
        lambda d: {
            **_text_to_image(d),
            "prior_token_id": d.whole(32, 64),
            "prior_token_drop": d.full(0, 64).bool(),
            "target_size": d.full(256.0, 2),
            "crop_coords": d.full(0.0, 2),
        },
    ),
    Example(
        "HiDreamImageTransformer2DModel",
        {
            **HEADS,
            "num_layers": 2,
            "num_single_layers": 2,
            "patch_size": 2,
            "in_channels": 4,
            "caption_channels": [24, 20],
            "text_emb_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (16, 16),
            "llama_layers": [0, 1, 1, 2],
        },
        lambda d: {
            "hidden_states": d.normal(4, 16, 16),
            "timesteps": d.full(500),
            "encoder_hidden_states_t5": d.normal(12, 24),
            "encoder_hidden_states_llama3": d.normal(3, 8, 20).transpose(0, 1).contiguous(),
            "pooled_embeds": d.normal(16),
        },
        timestep="timesteps",
    ),
    Example(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "text_dim": 24,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        lambda d: {
            "hidden_states": d.normal(2, 4, 1, 12, 16),
            "timestep": d.full(500.0),
            "encoder_hidden_states": d.normal(12, 24),
        },
    ),
    Example(
        "JoyImageEditPlusTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "text_dim": 24,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        lambda d: {
            "hidden_states": d.normal(96, 4, 1, 2, 2),
            "timestep": d.full(500.0),
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_hidden_states_mask": d.mask(12),
            "shape_list": [[(1, 6, 8), (1, 6, 8)]] * d.batch,
        },
    ),
    Example(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 16,
            "hidden_size": 64,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "cross_attention_dim": 24,
        },
        lambda d: {
            **_text_to_image(d, 0.5),
            "encoder_mask": d.mask(12),
            "cross_attention_kwargs": {},
            "image_rotary_emb": torch.polar(
                torch.ones(32, 32, 8), grid(32, 32).repeat(1, 4).reshape(32, 32, 8)
            ),
        },
    ),
    Example(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 128,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 64,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            "pos_embed_max_size": 16,
            "time_step_dim": 32,
        },
        lambda d: {
            "hidden_states": d.normal(4, 16, 16),
            "timestep": d.full(0.5),
            "input_ids": d.whole(64, 12),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.cat([torch.ones(13, 77).tril(), torch.ones(64, 77)]).repeat(
                d.batch, 1, 1
            ),
            "position_ids": torch.arange(77).repeat(d.batch, 1),
        },
    ),
    Example(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 24,
            "hidden_size": 48,
            "num_heads": 3,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda d: {**_text_to_image(d, 0.5), "attention_mask": d.mask(12, torch.bool)},
    ),
    Example(
        "Transformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "attention_bias": True,
            "sample_size": 16,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 24,
        },
        lambda d: {
            **_text_to_image(d),
            "encoder_attention_mask": d.mask(12),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    Example(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 48,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 32, 32],
        },
        lambda d: {"x": d.each(4, 1, 16, 16), "t": d.full(0.5), "cap_feats": d.each(12, 24)},
        latent="x",
        timestep="t",
    ),
)
