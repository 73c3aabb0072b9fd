"""Tiny video models of the LTX family, with sound or without: 72 packed video tokens."""

from __future__ import annotations

from toca_fx.examples.example import HEADS, Example, grid, rotary

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

EXAMPLES = (
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
        other_latents=("audio_hidden_states",),
        other_timesteps=("sigma",),
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
)
