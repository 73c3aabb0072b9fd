"""Tiny video models: depth 2, hidden size 32 to 96, 2 to 4 latent frames of 24 or more tokens and
fewer of text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toca_fx.examples.example import HEADS, Draw, Example, grid, rotary

_WAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
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
_HUNYUAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "rope_axes_dim": (4, 6, 6),
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
_LTX2 = {
    **HEADS,
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 48,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 3,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 24,
}


def _without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != name}


def _frames_first(d: Draw) -> dict[str, Any]:
    """What CogVideoX takes: the frame axis before the channels."""
    return {
        "hidden_states": d.normal(3, 4, 8, 12),
        "encoder_hidden_states": d.normal(12, 24),
        "timestep": d.full(500),
    }


def _image_to_video(d: Draw, channels: int = 4) -> dict[str, Any]:
    """What Wan takes with an image: its blocks expect exactly 512 text tokens, so there are more of
    the video too, 3 x 96.
    """
    return {
        "hidden_states": d.normal(channels, 3, 16, 24),
        "encoder_hidden_states": d.normal(512, 24),
        "encoder_hidden_states_image": d.normal(10, 20),
        "timestep": d.full(500),
    }


def _far_cache(d: Draw) -> dict[str, Tensor]:
    """Keys and values [2, B, heads, tokens, channels] of the frames before: none compressed, one of
    24 tokens in full.
    """
    return {
        "compressed_cache": torch.zeros(2, d.batch, 3, 0, 16),
        "full_cache": d.normal(2, 3, 24, 16).transpose(0, 1).contiguous(),
    }


def _cameras(d: Draw, frames: int) -> Tensor:
    """[B, frames, 20]: a flattened 4 x 4 camera-to-world matrix that moves forward, then focal
    lengths and centre in pixels.
    """
    pose = torch.eye(4).repeat(frames, 1, 1)
    pose[:, 2, 3] = torch.linspace(0, 0.5, frames)
    return torch.cat(
        [pose.flatten(1), torch.tensor([6.0, 6.0, 3.0, 2.0]).expand(frames, 4)], dim=1
    ).repeat(d.batch, 1, 1)


def _text_to_video(d: Draw, time: float = 500, channels: int = 4) -> dict[str, Any]:
    """Latents of 3 frames of 8 x 12 (3 x 24 tokens in patches of 2), 12 text tokens and a
    timestep.
    """
    return {
        "hidden_states": d.normal(channels, 3, 8, 12),
        "encoder_hidden_states": d.normal(12, 24),
        "timestep": d.full(time),
    }


EXAMPLES = (
    Example("WanTransformer3DModel", _WAN, _text_to_video),
    Example(
        "CogVideoXTransformer3DModel",
        {**_COGVIDEO, "use_rotary_positional_embeddings": True},
        lambda d: {**_frames_first(d), "image_rotary_emb": rotary(grid(3, 4, 6), 16)},
    ),
    Example(
        "LTXVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 48,
            "num_layers": 2,
            "caption_channels": 24,
        },
        lambda d: {
            "hidden_states": d.normal(3 * 4 * 6, 8),
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_attention_mask": d.mask(12),
            "timestep": d.full(500),
            "num_frames": 3,
            "height": 4,
            "width": 6,
        },
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
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN, "pooled_projection_dim": 16},
        lambda d: {
            **_text_to_video(d),
            "encoder_attention_mask": d.mask(12),
            "pooled_projections": d.normal(16),
            "guidance": d.full(6000.0),
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
            **_text_to_video(d),
            "attention_mask": d.full(1, 3, 8, 12),
            "encoder_attention_mask": d.mask(12),
            "image_rotary_emb": (
                tuple(rotary(grid(size), 8, halves=True) for size in (3, 4, 6)),
                tuple(axis.long()[None] for axis in grid(3, 4, 6).T),
            ),
        },
    ),
    Example(
        "AnyFlowTransformer3DModel",
        _WAN,
        lambda d: {
            "hidden_states": d.normal(3, 4, 8, 12),
            "encoder_hidden_states": d.normal(12, 24),
            "timestep": d.full(500.0, 3),
            "r_timestep": d.full(400.0, 3),
        },
    ),
    Example(
        "AnyFlowFARTransformer3DModel",
        _WAN,
        lambda d: {
            "hidden_states": d.normal(3, 4, 8, 12),
            "encoder_hidden_states": d.normal(12, 24),
            "timestep": d.full(500.0, 3),
            "r_timestep": d.full(400.0, 3),
            "chunk_partition": [1, 3],
            "kv_cache": [_far_cache(d) for _ in range(2)],
            "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": 1},
        },
    ),
    Example(
        "ChronoEditTransformer3DModel",
        {**_WAN, "image_dim": 20, "added_kv_proj_dim": 48},
        _image_to_video,
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
        lambda d: {**_text_to_video(d, 0.5), "fps": 24},
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
        _text_to_video,
    ),
    Example(
        "HeliosTransformer3DModel",
        {**_without(_WAN, "rope_max_seq_len"), "rope_dim": (4, 6, 6)},
        lambda d: {
            **_text_to_video(d),
            "indices_hidden_states": torch.arange(7, 10)[None],
            "indices_latents_history_short": torch.tensor([[0, 6]]),
            "indices_latents_history_mid": torch.tensor([[4, 5]]),
            "indices_latents_history_long": torch.tensor([[0, 1, 2, 3]]),
            "latents_history_short": d.normal(4, 2, 8, 12),
            "latents_history_mid": d.normal(4, 2, 8, 12),
            "latents_history_long": d.normal(4, 4, 8, 12),
        },
    ),
    Example(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **_HUNYUAN,
            "pooled_projection_dim": 16,
            "has_image_proj": True,
            "image_proj_dim": 20,
            "has_clean_x_embedder": True,
        },
        lambda d: {
            **_text_to_video(d),
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
        "LTX2VideoTransformer3DModel",
        _LTX2,
        lambda d: {
            "hidden_states": d.normal(3 * 4 * 6, 8),
            "audio_hidden_states": d.normal(20, 8),
            "encoder_hidden_states": d.normal(12, 24),
            "audio_encoder_hidden_states": d.normal(12, 24),
            "encoder_attention_mask": d.mask(12),
            "audio_encoder_attention_mask": d.mask(12),
            "timestep": d.full(500.0),
            "sigma": d.full(500.0),
            "num_frames": 3,
            "height": 4,
            "width": 6,
            "audio_num_frames": 20,
        },
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
        lambda d: {**_text_to_video(d), "encoder_attention_mask": d.mask(12, torch.bool)},
    ),
    Example(
        "MotifVideoTransformer3DModel",
        {
            **_without(_HUNYUAN, "num_refiner_layers"),
            "in_channels": 9,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "image_embed_dim": 20,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        lambda d: {
            **_text_to_video(d, 500.0, 9),
            "encoder_attention_mask": d.mask(12),
            "image_embeds": d.normal(6, 20),
        },
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
        lambda d: {**_text_to_video(d, 500.0), "encoder_attention_mask": d.mask(12)},
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
        "SanaWMLTX2RefinerTransformer3DModel",
        _LTX2,
        lambda d: {
            "hidden_states": d.normal(3 * 4 * 6, 8),
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_attention_mask": d.mask(12),
            "timestep": d.full(500.0, 72),
            "video_rotary_emb": tuple(
                table.repeat(d.batch, 1, 1) for table in rotary(grid(3, 4, 6), 48)
            ),
        },
    ),
    Example(
        "SkyReelsV2Transformer3DModel",
        _WAN,
        lambda d: {
            **_text_to_video(d),
            "timestep": d.full(500, 3),
            "enable_diffusion_forcing": True,
        },
    ),
    Example(
        "WanAnimateTransformer3DModel",
        {
            **_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 20,
            "added_kv_proj_dim": 48,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        lambda d: {
            **_image_to_video(d, 12),
            "pose_hidden_states": d.normal(4, 2, 16, 24),
            "face_pixel_values": d.normal(3, 5, 16, 16),
        },
    ),
    Example(
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": [0], "vace_in_channels": 9},
        lambda d: {
            **_text_to_video(d),
            "control_hidden_states": d.normal(9, 3, 8, 12),
            "control_hidden_states_scale": torch.ones(1),
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
