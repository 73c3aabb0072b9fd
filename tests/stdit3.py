"""STDiT3, the video transformer of Open-Sora v1.2.0 (hpcaitech/Open-Sora), for inference, with the
parameter names of that release.

Open-Sora itself needs CUDA kernels and reads tensor values in its forward pass; here are the same
numbers in plain PyTorch, in one graph. Tokens lie as [B, T * S, C]: T frames one after the other,
each of S = H * W patches, row by row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import TimestepEmbedder, randomize

# what only training, or the choice of a kernel, asks of Open-Sora's configuration
NOT_FOR_INFERENCE = {
    "class_dropout_prob",
    "drop_path",
    "enable_flash_attn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
    "freeze_y_embedder",
    "only_train_temporal",
}

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [T, head_dim] each


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [B, N, C], shift and scale [B, 1, C]."""
    return x * (1 + scale) + shift


def select_frames(x_mask: Tensor, x: Tensor, at_zero: Tensor) -> Tensor:
    """``x`` in the frames where x_mask [B, T] is true, ``at_zero`` in the others; x and at_zero [B,
    T * S, C].
    """
    frames = (*x_mask.shape, -1, x.shape[-1])
    return torch.where(
        x_mask[:, :, None, None], x.reshape(frames), at_zero.reshape(frames)
    ).reshape(x.shape)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Where Open-Sora casts to float32; float64, which it never runs in, stays."""
    return torch.promote_types(dtype, torch.float32)


class PatchEmbed3D(nn.Module):
    """Latents [B, C, T, H, W], zero-padded at the end to whole patches -> tokens [B, N, hidden]."""

    def __init__(self, patch: tuple[int, int, int], channels: int, hidden: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(channels, hidden, kernel_size=patch, stride=patch)

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """Patches along T, H and W."""
        frames, rows, columns = (
            -(-size // patch) for size, patch in zip(x.shape[2:], self.patch, strict=True)
        )
        return frames, rows, columns

    def forward(self, x: Tensor) -> Tensor:
        missing = [-size % patch for size, patch in zip(x.shape[2:], self.patch, strict=True)]
        if any(missing):
            frames, rows, columns = missing
            x = F.pad(x, (0, columns, 0, rows, 0, frames))
        return self.proj(x).flatten(2).transpose(1, 2)


class PositionEmbedding2D(nn.Module):
    """Sinusoids of a patch's place in its frame, half for the column, half for the row, measured in
    patches of a standard video.
    """

    inv_freq: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        half = hidden // 2
        self.register_buffer(
            "inv_freq", 1.0 / 10000 ** (torch.arange(0, half, 2).float() / half), persistent=False
        )

    def line(self, patches: int, scale: Tensor, base: int) -> Tensor:
        """One axis: [patches, hidden / 2]; ``base`` patches of the standard video span it, whatever
        the aspect.
        """
        places = torch.arange(patches, device=self.inv_freq.device) / scale * (base / patches)
        angles = places[:, None] * self.inv_freq
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, rows: int, columns: int, scale: Tensor) -> Tensor:
        base = round((rows * columns) ** 0.5)
        by_column = self.line(columns, scale, base)[None].expand(rows, -1, -1)
        by_row = self.line(rows, scale, base)[:, None].expand(-1, columns, -1)
        return torch.cat([by_column, by_row], dim=-1).flatten(0, 1)


class RotaryEmbedding(nn.Module):
    """Angles for the frames; channels 2i and 2i + 1 turn together."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(
            1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim), requires_grad=False
        )

    def forward(self, frames: int) -> Rotation:
        places = torch.arange(frames, device=self.freqs.device).to(self.freqs.dtype)
        angles = (places[:, None] * self.freqs).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [..., T, head_dim] turned by its frame's angles."""
    cosines, sines = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cosines + torch.stack([-odd, even], dim=-1).flatten(-2) * sines).to(x.dtype)


class LlamaRMSNorm(nn.Module):
    """The norm of queries and keys, per head, in float32."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(at_least_float32(x.dtype))
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )


class Attention(nn.Module):
    """Self-attention of [B, N, C]: within frames, or, with a rotation, along time."""

    def __init__(self, features: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.q_norm = LlamaRMSNorm(features // heads) if qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(features // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(features, features)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = (
            self.qkv(x)
            .view(batch, tokens, 3, self.num_heads, channels // self.num_heads)
            .permute(2, 0, 3, 1, 4)
        )
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(batch, tokens, channels)))


class MultiHeadCrossAttention(nn.Module):
    """Tokens [B, N, C] over text [B, L, C], without the text where mask [B, 1, 1, L] is false."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_linear = nn.Linear(features, features)
        self.kv_linear = nn.Linear(features, 2 * features)
        self.proj = nn.Linear(features, features)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, channels = x.shape
        query = self.q_linear(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        key, value = (
            self.kv_linear(text)
            .view(batch, text.shape[1], 2, self.num_heads, -1)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(batch, tokens, channels)))


class Mlp(nn.Module):
    """As timm has it, dropout modules included."""

    def __init__(self, features: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(0.0)
        self.fc2 = nn.Linear(hidden, out)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class CaptionEmbedder(nn.Module):
    """Text features to the width of the model; ``y_embedding`` is the empty caption that a sampler
    passes for guidance.
    """

    y_embedding: Tensor

    def __init__(self, channels: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = Mlp(channels, hidden, hidden)
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)


class STDiT3Block(nn.Module):
    """Self-attention (of a frame, or of a place through time), cross-attention, MLP; modulation t
    [B, 6 * C], t0 for masked frames.
    """

    def __init__(self, hidden: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden, heads, qk_norm)
        self.cross_attn = MultiHeadCrossAttention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden, int(hidden * mlp_ratio), hidden)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden) / hidden**0.5)

    def attend(self, x: Tensor, frames: int, rotation: Rotation | None) -> Tensor:
        """Attention along time where there is a rotation, else within each frame; [B, T * S, C]."""
        batch, _, channels = x.shape
        if rotation is None:
            return self.attn(x.reshape(batch * frames, -1, channels)).reshape(x.shape)
        by_place = (
            x.reshape(batch, frames, -1, channels).transpose(1, 2).reshape(-1, frames, channels)
        )
        return (
            self.attn(by_place, rotation)
            .reshape(batch, -1, frames, channels)
            .transpose(1, 2)
            .reshape(x.shape)
        )

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        t: Tensor,
        t0: Tensor | None,
        x_mask: Tensor | None,
        frames: int,
        rotation: Rotation | None = None,
    ) -> Tensor:
        now = (self.scale_shift_table + t.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)
        zero = (
            now
            if t0 is None
            else (self.scale_shift_table + t0.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)
        )

        def modulated(norm: nn.Module, shift: int) -> Tensor:
            at_t = modulate(norm(x), now[shift], now[shift + 1])
            if x_mask is None:
                return at_t
            return select_frames(
                x_mask, at_t, modulate(norm(x), zero[shift], zero[shift + 1])
            )  # a second norm, as Open-Sora has it

        def gated(y: Tensor, gate: int) -> Tensor:
            return (
                now[gate] * y
                if x_mask is None
                else select_frames(x_mask, now[gate] * y, zero[gate] * y)
            )

        x = x + gated(self.attend(modulated(self.norm1, 0), frames, rotation), 2)
        x = x + self.cross_attn(x, text, text_mask)
        return x + gated(self.mlp(modulated(self.norm2, 3)), 5)


class T2IFinalLayer(nn.Module):
    """Tokens -> patches of the output; t [B, C], t0 for masked frames."""

    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden, outputs)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden) / hidden**0.5)

    def modulated(self, x: Tensor, t: Tensor) -> Tensor:
        return modulate(x, *(self.scale_shift_table + t[:, None]).chunk(2, dim=1))

    def forward(self, x: Tensor, t: Tensor, t0: Tensor | None, x_mask: Tensor | None) -> Tensor:
        y = self.modulated(self.norm_final(x), t)
        if x_mask is not None and t0 is not None:
            # Masked frames are modulated a second time, as Open-Sora has it (its samplers do not
            # read them).
            y = select_frames(x_mask, y, self.modulated(y, t0))
        return self.linear(y)


class STDiT3(nn.Module):
    """The whole model; the defaults are STDiT3-XL/2 as Open-Sora 1.2 ships it."""

    def __init__(
        self,
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        pred_sigma: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
        **others: Any,
    ) -> None:
        super().__init__()
        if unknown := set(others) - NOT_FOR_INFERENCE:
            raise TypeError(f"STDiT3 has no setting {', '.join(sorted(unknown))}")
        frames, rows, columns = patch_size
        self.patch_size = (frames, rows, columns)
        self.input_sq_size = input_sq_size
        self.out_channels = in_channels * 2 if pred_sigma else in_channels
        self.pos_embed = PositionEmbedding2D(hidden_size)
        self.rope = RotaryEmbedding(hidden_size // num_heads)
        self.x_embedder = PatchEmbed3D(self.patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.fps_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(
                [STDiT3Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)]
            )
            for _ in range(2)
        )
        self.final_layer = T2IFinalLayer(
            hidden_size, math.prod(self.patch_size) * self.out_channels
        )

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, patch * C] -> [B, C, T, H, W], padding included."""
        pixels = x.reshape(x.shape[0], *grid, *self.patch_size, self.out_channels).permute(
            0, 7, 1, 4, 2, 5, 3, 6
        )
        return pixels.reshape(
            x.shape[0],
            self.out_channels,
            *(n * p for n, p in zip(grid, self.patch_size, strict=True)),
        )

    # What tests/authors.py has as Open-Sora wrote it.

    def scale(self, height: Tensor, width: Tensor) -> Any:
        """The side of the video in standard sides, which Open-Sora computes in Python floats, from
        values that it reads back from the device.
        """
        return ((height[0].double() * width[0].double()).sqrt() / self.input_sq_size).float()

    def read(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        """The text of each sample, and what its attention is told of padding."""
        text = self.y_embedder(y).squeeze(1)
        if mask is None:
            return text, None
        return text, (mask != 0).repeat(y.shape[0] // mask.shape[0], 1)[:, None, None]

    def run_block(self, block: nn.Module, *given: Any) -> Tensor:
        return block(*given)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        *,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
        **_: Any,
    ) -> Tensor:
        """Latents x [B, C, T, H, W] and text y [B, 1, L, channels] -> [B, out_channels, T, H, W].

        The result is in float32.

        mask [n, L] is nonzero where there is text, x_mask [B, T] false in the frames that are given
        (timestep 0 for them). fps, height and width (of the video in pixels) are [n]; n divides B,
        and rows are repeated, which serves both guidance halves. Further keywords that Open-Sora's
        samplers pass (num_frames, ar) change nothing.
        """
        dtype, batch = self.x_embedder.proj.weight.dtype, x.shape[0]
        x, timestep, y = x.to(dtype), timestep.to(dtype), y.to(dtype)
        frames, rows, columns = grid = self.x_embedder.grid(x)
        size = x.shape[2:]

        fps = self.fps_embedder(fps.repeat(batch // fps.shape[0]))
        t = self.t_embedder(timestep) + fps
        modulation, t0, modulation0 = self.t_block(t), None, None
        if x_mask is not None:
            t0 = self.t_embedder(torch.zeros_like(timestep)) + fps
            modulation0 = self.t_block(t0)

        text, text_mask = self.read(y, mask)
        places = self.pos_embed(rows, columns, self.scale(height, width)).to(dtype)
        x = self.x_embedder(x)
        x = (x.reshape(batch, frames, -1, x.shape[-1]) + places).reshape(x.shape)

        rotation = self.rope(frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            given = text, text_mask, modulation, modulation0, x_mask, frames
            x = self.run_block(spatial, x, *given)
            x = self.run_block(temporal, x, *given, rotation)

        x = self.unpatchify(self.final_layer(x, t, t0, x_mask), grid)
        return x[:, :, : size[0], : size[1], : size[2]].to(at_least_float32(dtype))


def tiny_stdit3(seed: int = 0, **overrides: Any) -> STDiT3:
    """A small random STDiT3 in eval mode: by default 2 + 2 blocks, 2 heads of 16, text of 24
    channels.
    """
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "caption_channels": 24,
        "model_max_length": 10,
    }
    model = STDiT3(**{**settings, **overrides}).eval().requires_grad_(False)
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in model.state_dict().items():  # what randomize() leaves as it is
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("scale_shift_table"):
            tensor.copy_(noise * 0.4)
        elif name.endswith("_norm.weight"):
            tensor.copy_(1 + noise * 0.3)
        elif name == "x_embedder.proj.weight":
            tensor.copy_(noise * (1.5 / tensor[0].numel() ** 0.5))
        elif name == "x_embedder.proj.bias":
            tensor.copy_(noise * 0.2)
        elif name == "y_embedder.y_embedding":
            tensor.copy_(noise)
    return model


def tiny_inputs(
    model: STDiT3,
    batch: int = 2,
    size: tuple[int, int, int] = (4, 8, 12),
    text_tokens: int = 10,
    seed: int = 0,
    **overrides: Any,
) -> dict[str, Any]:
    """Keywords of one call: random latents of T x H x W = ``size``, timestep 700, text without
    padding, no masked frames.
    """
    generator = torch.Generator().manual_seed(seed)
    channels = model.x_embedder.proj.in_channels
    caption_channels = model.y_embedder.y_embedding.shape[1]
    inputs = {
        "x": torch.randn(batch, channels, *size, generator=generator),
        "timestep": torch.full((batch,), 700.0),
        "y": torch.randn(batch, 1, text_tokens, caption_channels, generator=generator),
        "fps": torch.tensor([24.0]),
        "height": torch.tensor([8.0 * size[1]]),
        "width": torch.tensor([8.0 * size[2]]),
    }
    return {**inputs, **overrides}


def open_sora_1_2(device: str = "meta") -> STDiT3:
    """The model of Open-Sora 1.2 at its real size (STDiT3-XL/2, 1.2e9 parameters), in eval mode; on
    "meta" it has no storage.
    """
    with torch.device(device):
        return STDiT3().eval().requires_grad_(False)


def open_sora_1_2_inputs(text_tokens: int = 300, device: str = "meta") -> dict[str, Tensor]:
    """Keywords of a call for 2 seconds of 480p with guidance: 2 x 15 frames of 60 x 106 latents,
    that is 30 x 53 patches each.
    """
    with torch.device(device):
        return {
            "x": torch.randn(2, 4, 15, 60, 106),
            "timestep": torch.full((2,), 700.0),
            "y": torch.randn(2, 1, text_tokens, 4096),
            "mask": torch.ones(1, text_tokens, dtype=torch.int64),
            "x_mask": torch.ones(2, 15, dtype=torch.bool),
            "fps": torch.full((1,), 24.0),
            "height": torch.full((1,), 480.0),
            "width": torch.full((1,), 854.0),
        }
