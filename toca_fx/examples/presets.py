"""Models in the size they are released in, for counting FLOPs on "meta" and for the benchmark."""

from __future__ import annotations

import torch

from toca_fx.examples.example import Draw, Example, grid


def _dit_xl_2(side: int) -> Example:
    """DiT-XL/2 on latents of ``side`` x ``side``."""
    return Example(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "sample_size": side,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
        lambda d: {
            "hidden_states": d.normal(4, side, side),
            "timestep": d.full(500),
            "class_labels": d.whole(1000),
        },
    )


def pixart_alpha_256(text: int = 27) -> Example:
    """PixArt-alpha XL/2 at 256 x 256 pixels with ``text`` caption tokens, none of them padding."""
    return _pixart_alpha(32, text)


def _pixart_alpha(side: int, text: int) -> Example:
    """PixArt-alpha XL/2 on latents of ``side`` x ``side``.

    The model for 1024 pixels, ``side`` 128, takes the size of the image as a condition too.
    """
    sized = side == 128

    def inputs(d: Draw) -> dict[str, object]:
        return {
            "hidden_states": d.normal(4, side, side),
            "encoder_hidden_states": d.normal(text, 4096),
            "timestep": d.full(500),
            "added_cond_kwargs": {
                "resolution": d.full(8.0 * side, 2) if sized else None,
                "aspect_ratio": d.full(1.0, 1) if sized else None,
            },
        }

    return Example(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "sample_size": side,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 4096,
            "use_additional_conditions": sized,
        },
        inputs,
    )


def _latte(frames: int, side: int, text: int = 120) -> Example:
    """Latte-1 on ``frames`` latents of ``side`` x ``side`` and ``text`` caption tokens."""
    return Example(
        "LatteTransformer3DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "attention_bias": True,
            "sample_size": side,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 4096,
            "video_length": frames,
        },
        lambda d: {
            "hidden_states": d.normal(4, frames, side, side),
            "encoder_hidden_states": d.normal(text, 4096),
            "timestep": d.full(500),
        },
    )


def _flux_dev(side: int, text: int = 512, **other: object) -> Example:
    """FLUX.1-dev on ``side`` x ``side`` packed latents, pixels / 16, and ``text`` tokens.

    ``other`` is what its configuration has otherwise.
    """
    return Example(
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
            **other,
        },
        lambda d: _flux_inputs(d, side, text),
        batch=1,
    )


def _flux_inputs(d: Draw, side: int, text: int) -> dict[str, object]:
    return {
        "hidden_states": d.normal(side * side, 64),
        "encoder_hidden_states": d.normal(text, 4096),
        "pooled_projections": d.normal(768),
        "timestep": d.full(0.5),
        "img_ids": grid(1, side, side),
        "txt_ids": torch.zeros(text, 3),
        "guidance": d.full(3.5),
    }


def _wan_1_3b(frames: int, height: int, width: int, text: int = 512) -> Example:
    """Wan 2.1 1.3B on ``frames`` latents of ``height`` x ``width``.

    The sizes are those of the video in pixels / 8, and (its frames + 3) / 4.
    """
    return Example(
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 8960,
            "num_layers": 30,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "rope_max_seq_len": 1024,
        },
        lambda d: {
            "hidden_states": d.normal(16, frames, height, width),
            "encoder_hidden_states": d.normal(text, 4096),
            "timestep": d.full(500),
        },
        batch=1,
    )


PRESETS = {
    "dit-xl-2-256": _dit_xl_2(32),
    "dit-xl-2-512": _dit_xl_2(64),
    "pixart-alpha-256": pixart_alpha_256(),
    "pixart-alpha-1024": _pixart_alpha(128, 120),
    "latte-256": _latte(16, 32),
    "flux-dev-512": _flux_dev(32),
    "flux-dev-1024": _flux_dev(64),
    "flux-768": _flux_dev(
        32,
        text=256,
        num_layers=3,
        num_single_layers=6,
        num_attention_heads=12,
        attention_head_dim=64,
        axes_dims_rope=(8, 28, 28),
    ),
    "wan-1.3b-480p": _wan_1_3b(9, 60, 104),
}
"""Examples in real size by name.

The batch is 1 for flux-dev, which is distilled from guidance, and for Wan (480p, 33 frames), whose
pipeline calls the model once with the prompt and once without; it is 2 for the others. ``flux-768``
has FLUX's blocks at a width of 768: with 1,280 tokens, attention is much of its work.
"""
