"""Tiny autoencoders, with the weights that diffusers draws."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from tools.pipelines.parts import seeded


def vae(name: str, **config: Any) -> nn.Module:
    """An autoencoder of diffusers with random weights, in eval mode."""
    made: nn.Module = seeded(lambda: getattr(diffusers, name)(**config))
    return made


def image_vae(channels: int = 4, factor: int = 2, **config: Any) -> nn.Module:
    """AutoencoderKL: RGB pictures, and latents of ``channels`` that are ``factor`` smaller."""
    depth = factor.bit_length()
    return vae(
        "AutoencoderKL",
        **{
            "block_out_channels": (8,) * depth,
            "down_block_types": ("DownEncoderBlock2D",) * depth,
            "up_block_types": ("UpDecoderBlock2D",) * depth,
            "layers_per_block": 1,
            "latent_channels": channels,
            "norm_num_groups": 4,
            "sample_size": 32,
            **config,
        },
    )


def wan_vae(channels: int = 16, **config: Any) -> nn.Module:
    """AutoencoderKLWan: latents are 4 times shorter and 8 times smaller than the video."""
    return vae(
        "AutoencoderKLWan",
        **{
            "base_dim": 3,
            "z_dim": channels,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
            **config,
        },
    )
