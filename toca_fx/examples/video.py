"""The other tiny video models: depth 2, 2 to 4 latent frames of 24 or more tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toca_fx.examples.example import HEADS, Draw, Example, grid, rotary, text_to_video

_COGVIDEO = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 12,
}

_KANDINSKY = {
    "in_text_dim": 24,
    "in_text_dim2": 20,
    "time_dim": 32,
    "model_dim": 48,
    "ff_dim": 120,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}


def _frames_first(d: Draw) -> dict[str, Any]:
    """What CogVideoX takes: the frame axis before the channels."""
    return {
        "hidden_states": d.normal(3, 4, 8, 12),
        "encoder_hidden_states": d.normal(12, 24),
        "timestep": d.full(500),
    }


def _cameras(d: Draw, frames: int) -> Tensor:
    """Cameras that move forward: [B, frames, 20].

    The channels are a flattened 4 x 4 camera-to-world matrix, two focal lengths and the centre,
    both in pixels.
    """
    pose = torch.eye(4).repeat(frames, 1, 1)
    pose[:, 2, 3] = torch.linspace(0, 0.5, frames)
    return torch.cat(
        [pose.flatten(1), torch.tensor([6.0, 6.0, 3.0, 2.0]).expand(frames, 4)], dim=1
    ).repeat(d.batch, 1, 1)


EXAMPLES = (
    Example(
        "CogVideoXTransformer3DModel",
        {**_COGVIDEO, "use_rotary_positional_embeddings": True},
        lambda d: {**_frames_first(d), "image_rotary_emb": rotary(grid(3, 4, 6), 16)},
    ),
    Example(
        "LatteTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "attention_bias": True,
            "sample_size": 12,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 24,
            "video_length": 4,
        },
        lambda d: {
            "hidden_states": d.normal(4, 4, 12, 12),
            "encoder_hidden_states": d.normal(12, 24),
            "timestep": d.full(500),
        },
    ),
    Example(
        "AllegroTransformer3DModel",
        {
            **HEADS,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 72,
            "caption_channels": 24,
        },
        lambda d: {
            **text_to_video(d),
            "attention_mask": d.full(1, 3, 8, 12),
            "encoder_attention_mask": d.mask(12),
            "image_rotary_emb": (
                tuple(rotary(grid(size), 8, halves=True) for size in (3, 4, 6)),
                tuple(axis.long()[None] for axis in grid(3, 4, 6).T),
            ),
        },
    ),
    Example(
        "ConsisIDTransformer3DModel",
        {
            **_COGVIDEO,
            "use_rotary_positional_embeddings": True,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 16,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 20,
            "LFE_vit_dim": 24,
            "LFE_depth": 2,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 32,
            "LFE_num_scale": 2,
        },
        lambda d: {
            **_frames_first(d),
            "image_rotary_emb": rotary(grid(3, 4, 6), 16),
            "id_cond": d.normal(20),
            "id_vit_hidden": [d.normal(6, 24) for _ in range(2)],
        },
    ),
    Example(
        "CosmosTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": 24,
            "adaln_lora_dim": 8,
            "max_size": (8, 16, 16),
            # The channel of the padding mask is resized by torchvision.
            "concat_padding_mask": False,
        },
        lambda d: {**text_to_video(d, 0.5), "fps": 24},
    ),
    Example(
        "EasyAnimateTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 12,
            "sample_height": 8,
            "num_layers": 3,
            "mmdit_layers": 2,
            "time_embed_dim": 16,
            "text_embed_dim": 24,
            "add_norm_text_encoder": True,
        },
        text_to_video,
    ),
    Example(
        "Kandinsky5Transformer3DModel",
        {**_KANDINSKY, "in_visual_dim": 4, "out_visual_dim": 4},
        lambda d: {
            "hidden_states": d.normal(3, 8, 12, 4),
            "encoder_hidden_states": d.normal(12, 24),
            "timestep": d.full(500.0),
            "pooled_projections": d.normal(20),
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(6)],
            "text_rope_pos": torch.arange(12),
        },
    ),
    Example(
        "Kandinsky6Transformer3DModel",
        {
            **_KANDINSKY,
            "ff_dim": 192,
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_audio_dim": 8,
            "out_audio_dim": 8,
        },
        lambda d: {
            "hidden_states": d.normal(3, 8, 12, 9),
            "audio_hidden_states": d.normal(20, 8),
            "encoder_hidden_states": d.normal(12, 24),
            "timestep": d.full(500.0),
            "pooled_projections": d.normal(20),
        },
        other_latents=("audio_hidden_states",),
    ),
    Example(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 32,
            "model_dim": 48,
            "ff_dim": 192,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "nabla_window": (3, 3, 3),
        },
        lambda d: {"hidden_states": d.normal(2, 8, 16, 9), "timestep": d.full(500.0)},
    ),
    Example(
        "MiniMaxH3Transformer3DModel",
        {
            **HEADS,
            "hidden_size": 40,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 108,
            "in_channels": 2,
            "audio_in_channels": 8,
            "text_dim": 24,
            "freq_dim": 32,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        lambda d: {
            "hidden_states": d.normal(72, 8),
            "audio_hidden_states": d.normal(20, 8),
            "encoder_hidden_states": d.normal(12, 24),
            "timestep": torch.tensor([0.0, 500.0]),
            "timestep_indices": (torch.arange(104) >= 12).long(),
            "token_tags": torch.cat(
                [torch.full((12,), 2), torch.full((72,), 0), torch.full((20,), 1)]
            ),
            "position_ids": torch.cat(
                [grid(12).expand(12, 3), grid(3, 4, 6) + 12, grid(20).expand(20, 3) + 12]
            ),
            "text_indices": torch.arange(12),
            "video_indices": torch.arange(12, 84),
            "audio_indices": torch.arange(84, 104),
        },
        other_latents=("audio_hidden_states",),
    ),
    Example(
        "MochiTransformer3DModel",
        {
            **HEADS,
            "num_layers": 2,
            "pooled_projection_dim": 32,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "max_sequence_length": 12,
        },
        lambda d: {**text_to_video(d), "encoder_attention_mask": d.mask(12, torch.bool)},
    ),
    Example(
        "SanaVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 3,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 48,
            "caption_channels": 24,
            "sample_size": 12,
        },
        lambda d: {**text_to_video(d, 500.0), "encoder_attention_mask": d.mask(12)},
    ),
    Example(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "caption_channels": 24,
        },
        lambda d: {
            "hidden_states": d.normal(4, 3, 4, 6),
            "timestep": d.full(500.0, 1, 3),
            "encoder_hidden_states": d.normal(1, 12, 24),
            "encoder_attention_mask": d.mask(12),
            "camera_conditions": _cameras(d, 3),
            "chunk_plucker": d.normal(6, 3, 4, 6),
        },
    ),
    Example(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 16,
            "hidden_size": 64,
            "intermediate_size": 192,
            "latent_channel": 4,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "patch_latent_dim": 16,
            "rope_axes_dim": (4, 2, 2),
            "vocab_size": 64,
        },
        lambda d: {  # one packed sequence without a batch axis
            "input_ids": d.whole(64, 12)[0],
            "text_indexes": torch.arange(12),
            "position_ids": torch.cat(
                [grid(12).expand(12, 3), grid(3, 4, 6) + 15012]
            ).T.contiguous(),
            "und_len": 12,
            "sequence_length": 84,
            "vision_tokens": [d.normal(4, 3, 8, 12)[:1]],
            "vision_token_shapes": [(3, 4, 6)],
            "vision_sequence_indexes": torch.arange(12, 84),
            "vision_mse_loss_indexes": torch.arange(12, 84),
            "vision_timesteps": torch.full((72,), 500.0),
            "vision_noisy_frame_indexes": [torch.arange(3)],
        },
        latent="vision_tokens",
        timestep="vision_timesteps",
        batch=1,
    ),
)
