"""Tiny models of sound, and of proteins: depth 2, 72 or more tokens and fewer of text."""

from __future__ import annotations

import torch

from toca_fx.examples.example import HEADS, Example, grid, rotary

EXAMPLES = (
    Example(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 16,
            "encoder_hidden_size": 24,
        },
        lambda d: {
            "hidden_states": d.normal(144, 8),
            "timestep": d.full(0.5),
            "timestep_r": d.full(0.5),
            "encoder_hidden_states": d.normal(12, 24),
            "context_latents": d.normal(144, 16),
        },
        other_timesteps=("timestep_r",),
    ),
    Example(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 48, "dit_depth": 2, "dit_heads": 3, "dit_text_dim": 24, "latent_dim": 8},
        lambda d: {
            "hidden_states": d.normal(72, 8),
            "encoder_hidden_states": d.normal(12, 24),
            "encoder_attention_mask": d.mask(12, torch.bool),
            "timestep": d.full(0.5),
            "attention_mask": d.full(1, 72).bool(),
            "latent_cond": d.normal(72, 8),
        },
    ),
    Example(
        "MiniMaxMusic3Transformer1DModel",
        {
            **HEADS,
            "in_channels": 8,
            "condition_dim": 24,
            "num_layers": 2,
            "ff_inner_dim": 192,
            "rotary_dim": 8,
            "fourier_embedding_dim": 32,
        },
        lambda d: {
            "hidden_states": d.normal(8, 72),
            "timestep": d.full(0.5),
            "encoder_hidden_states": d.normal(72, 24),
        },
    ),
    Example(
        "StableAudioDiTModel",
        {
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "attention_head_dim": 16,
            "sample_size": 72,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "time_proj_dim": 32,
            "global_states_input_dim": 24,
            "cross_attention_input_dim": 24,
        },
        lambda d: {
            "hidden_states": d.normal(8, 72),
            "timestep": d.full(0.5),
            "encoder_hidden_states": d.normal(12, 24),
            "global_hidden_states": d.normal(1, 24),
            "rotary_embedding": rotary(grid(73), 8, halves=True),
        },
    ),
    Example(
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 24,
            "global_cond_dim": 20,
            "local_add_cond_dim": 9,
            "timestep_features_dim": 32,
            "num_memory_tokens": 6,
        },
        lambda d: {
            "hidden_states": d.normal(8, 72),
            "timestep": d.full(0.5),
            "encoder_hidden_states": d.normal(12, 24),
            "global_hidden_states": d.normal(20),
            "encoder_attention_mask": d.mask(12),
            "local_add_cond": d.normal(9, 72),
        },
    ),
    Example(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 2,
            "token_dim": 48,
            "nheads": 3,
            "dim_cond": 32,
            "pair_repr_dim": 16,
            "latent_dim": 8,
            "t_emb_dim": 32,
            "seq_sep_dim": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 16,
        },
        lambda d: {
            "bb_ca": d.normal(72, 3),
            "local_latents": d.normal(72, 8),
            "bb_ca_time": d.full(0.5),
            "local_latents_time": d.full(0.5),
            "padding_mask": d.full(1, 72).bool(),
            "conditioning": {
                "is_in_context_conditioning": d.full(0, 72).bool(),
                "supports_local_latent": d.full(1, 72).bool(),
            },
        },
        latent="bb_ca",
        timestep="bb_ca_time",
        other_latents=("local_latents",),
        other_timesteps=("local_latents_time",),
    ),
)
