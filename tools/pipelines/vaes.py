"""Tiny autoencoders, with the weights that diffusers draws."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from tools.pipelines.parts import model, seeded


def vae(name: str, **config: Any) -> nn.Module:
    """An autoencoder of diffusers with random weights, in eval mode."""
    made: nn.Module = seeded(lambda: getattr(diffusers, name)(**config))
    return made


def _softer(made: nn.Module) -> nn.Module:
    """The autoencoder with a quarter of the contrast: most of its pixels were black or white."""
    for parameter in made.decoder.conv_out.parameters():
        parameter.mul_(0.25)
    return made


def image_vae(
    channels: int = 4, factor: int = 2, name: str = "AutoencoderKL", **config: Any
) -> nn.Module:
    """An autoencoder of RGB pictures; its latents of ``channels`` are ``factor`` times smaller."""
    depth = factor.bit_length()
    return vae(
        name,
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


def wan22_vae() -> nn.Module:
    """AutoencoderKLWan as of Wan 2.2 5B: latents are 4 times shorter and 16 times smaller."""
    return wan_vae(
        in_channels=12, out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16
    )


def qwen_vae(channels: int = 4, factor: int = 4) -> nn.Module:
    """AutoencoderKLQwenImage: latents are ``factor`` times smaller than the picture."""
    halvings = factor.bit_length() - 1
    return vae(
        "AutoencoderKLQwenImage",
        base_dim=2,
        z_dim=channels,
        dim_mult=[1] * (halvings + 1),
        num_res_blocks=1,
        temperal_downsample=[False, *[True] * (halvings - 1)],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def qwen21_vae(channels: int = 16) -> nn.Module:
    """AutoencoderKLQwenImage21: latents are 16 times smaller than the picture."""
    return vae(
        "AutoencoderKLQwenImage21",
        base_dim=4,
        decoder_base_dim=4,
        z_dim=channels,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def dc_vae(channels: int = 4) -> nn.Module:
    """AutoencoderDC: latents are half the picture's size."""
    return vae(
        "AutoencoderDC",
        latent_channels=channels,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )


def ltx_vae(channels: int = 8) -> nn.Module:
    """AutoencoderKLLTXVideo: latents are 4 times shorter and 4 times smaller than the video."""
    return vae(
        "AutoencoderKLLTXVideo",
        latent_channels=channels,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )


def hunyuan_video_vae(channels: int = 4) -> nn.Module:
    """AutoencoderKLHunyuanVideo: latents are 4 times shorter and 8 times smaller."""
    return vae(
        "AutoencoderKLHunyuanVideo",
        latent_channels=channels,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def mochi_vae() -> nn.Module:
    """AutoencoderKLMochi: latents of 12 channels, 6 times shorter and 8 times smaller."""
    return vae(
        "AutoencoderKLMochi",
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )


def cogvideo_vae(channels: int = 4) -> nn.Module:
    """AutoencoderKLCogVideoX: latents are 4 times shorter and 8 times smaller."""
    made = vae(
        "AutoencoderKLCogVideoX",
        latent_channels=channels,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return _softer(made)


def allegro_vae(channels: int = 4) -> nn.Module:
    """AutoencoderKLAllegro: latents are 4 times shorter and 8 times smaller."""
    made = vae(
        "AutoencoderKLAllegro",
        latent_channels=channels,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    # It decodes in tiles only, as large as these: frames, height, width.
    made.kernel = made.stride = (8, 64, 64)
    made.enable_tiling()
    return made


def oobleck_vae(channels: int = 8) -> nn.Module:
    """AutoencoderOobleck: latents are half as long as the sound, of 4 samples a second."""
    return vae(
        "AutoencoderOobleck",
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=channels,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )


def cosmos_vae(channels: int = 16) -> nn.Module:
    """AutoencoderKLCosmos: latents are 4 times shorter and 8 times smaller."""
    made = vae(
        "AutoencoderKLCosmos",
        latent_channels=channels,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        patch_type="haar",
        scaling_factor=1.0,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    return _softer(made)


def magvit_vae(channels: int = 4) -> nn.Module:
    """AutoencoderKLMagvit: latents are 4 times shorter and 8 times smaller."""
    return vae(
        "AutoencoderKLMagvit",
        latent_channels=channels,
        block_out_channels=[8] * 4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )


def hunyuan_image_vae(channels: int = 8) -> nn.Module:
    """AutoencoderKLHunyuanImage: latents are 8 times smaller than the picture."""
    return vae(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.75,
    )


def hunyuan_video15_vae(channels: int = 4) -> nn.Module:
    """AutoencoderKLHunyuanVideo15: latents are 4 times shorter and 8 times smaller."""
    return vae(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=channels,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        spatial_compression_ratio=8,
    )


def same_vae(channels: int = 8) -> nn.Module:
    """AutoencoderSAME: latents are 8 times shorter than the sound, of 16 samples a second.

    The weights that diffusers draws decode any latents to the same sound.
    """
    return model(
        "AutoencoderSAME",
        patch_size=4,
        encoder_channels=16,
        encoder_c_mults=(1,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=channels,
        dim_heads=8,
        sampling_rate=16,
    )


def longcat_vae(channels: int = 8) -> nn.Module:
    """LongCatAudioDiTVae: latents are 8 times shorter than the sound, of 16 samples a second."""
    return vae(
        "LongCatAudioDiTVae",
        channels=8,
        c_mults=[1, 2],
        strides=[2, 4],
        latent_dim=channels,
        encoder_latent_dim=2 * channels,
        downsampling_ratio=8,
        sample_rate=16,
    )


def ltx2_vae(channels: int = 4) -> nn.Module:
    """AutoencoderKLLTX2Video: latents are 2 times shorter and 2 times smaller."""
    made = vae(
        "AutoencoderKLLTX2Video",
        latent_channels=channels,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    made.use_framewise_encoding = False
    made.use_framewise_decoding = False
    return made


def ltx2_audio_vae(channels: int = 2) -> nn.Module:
    """AutoencoderKLLTX2Audio: latents of mel spectrograms with 8 bins."""
    return vae(
        "AutoencoderKLLTX2Audio",
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=channels,
        mel_bins=8,
    )
