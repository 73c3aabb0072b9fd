"""Tiny video models of the Wan family: depth 2, 3 or 4 latent frames of 24 or more tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toca_fx.examples.example import HEADS, Draw, Example, text_to_video

_BLOCKS = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
}
_WAN = {**_BLOCKS, "rope_max_seq_len": 32}


def _image_to_video(d: Draw, channels: int = 4) -> dict[str, Any]:
    """What Wan takes with an image: 3 x 96 video tokens and 512 of text.

    Its blocks expect exactly 512 text tokens, and video tokens are to be the most.
    """
    return {
        "hidden_states": d.normal(channels, 3, 16, 24),
        "encoder_hidden_states": d.normal(512, 24),
        "encoder_hidden_states_image": d.normal(10, 20),
        "timestep": d.full(500),
    }


def _far_cache(d: Draw) -> dict[str, Tensor]:
    """Keys and values of the frames before: none compressed, one of 24 tokens in full.

    Each tensor is [2, B, heads, tokens, channels].
    """
    return {
        "compressed_cache": torch.zeros(2, d.batch, 3, 0, 16),
        "full_cache": d.normal(2, 3, 24, 16).transpose(0, 1).contiguous(),
    }


EXAMPLES = (
    Example("WanTransformer3DModel", _WAN, text_to_video),
    Example(
        "AnyFlowTransformer3DModel",
        _WAN,
        lambda d: {
            "hidden_states": d.normal(3, 4, 8, 12),
            "encoder_hidden_states": d.normal(12, 24),
            "timestep": d.full(500.0, 3),
            "r_timestep": d.full(400.0, 3),
        },
        other_timesteps=("r_timestep",),
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
        other_timesteps=("r_timestep",),
    ),
    Example(
        "ChronoEditTransformer3DModel",
        {**_WAN, "image_dim": 20, "added_kv_proj_dim": 48},
        _image_to_video,
    ),
    Example(
        "HeliosTransformer3DModel",
        {**_BLOCKS, "rope_dim": (4, 6, 6)},
        lambda d: {
            **text_to_video(d),
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
        "SkyReelsV2Transformer3DModel",
        _WAN,
        lambda d: {
            **text_to_video(d),
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
            **text_to_video(d),
            "control_hidden_states": d.normal(9, 3, 8, 12),
            "control_hidden_states_scale": torch.ones(1),
        },
    ),
)
