"""PixArt-alpha, FLUX.1 and Open-Sora as their authors wrote them, in plain PyTorch.

Names of parameters and the way to compute are those of PixArt-alpha/PixArt-alpha,
black-forest-labs/flux and hpcaitech/Open-Sora: captions without padding, packed in one row for all
samples; sizes read out of tensors; blocks run through ``torch.utils.checkpoint``; tables that are
written at the first call. Attention kernels (xformers, flash-attention) are PyTorch's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests import stdit3
from tests.models import PatchEmbed, TimestepEmbedder, sincos_table
from tests.stdit3 import CaptionEmbedder, Mlp, STDiT3, T2IFinalLayer, modulate


def packed(y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Captions y [B, 1, L, C] without padding, one behind the other [1, sum, C], and the sample of
    each token [sum]; mask [n, L] where n divides B.

    The authors hand lists of lengths to a kernel. Of two lists Dynamo does not know that they are
    equally long: the tokens are looked up once.
    """
    mask = mask.repeat(y.shape[0] // mask.shape[0], 1)
    kept = mask.flatten().nonzero().squeeze(1)
    return y.flatten(0, 2)[kept][None], kept // mask.shape[1]


class CrossAttention(stdit3.MultiHeadCrossAttention):
    """Tokens [B, N, C] over packed text [1, sum, C], whose tokens are those of ``samples``."""

    def forward(self, x: Tensor, text: Tensor, samples: Any) -> Tensor:
        batch, tokens, channels = x.shape
        width = channels // self.num_heads
        query = self.q_linear(x).view(1, -1, self.num_heads, width)
        key, value = self.kv_linear(text).view(1, -1, 2, self.num_heads, width).unbind(2)
        own = torch.arange(batch).repeat_interleave(tokens)[:, None] == samples
        q, k, v = (operand.transpose(1, 2) for operand in (query, key, value))
        # As ToCa's authors spell it, to keep the map; Dynamo knows no fused one of unknown length.
        logits = q @ k.transpose(-1, -2) * width**-0.5
        mixed = logits.masked_fill(~own, -torch.inf).softmax(dim=-1) @ v
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(batch, -1, channels)))


class PixArtBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attn = stdit3.Attention(hidden, heads, qk_norm=False)
        self.cross_attn = CrossAttention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden, int(hidden * mlp_ratio), hidden)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden) / hidden**0.5)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, samples: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.scale_shift_table[None] + t.reshape(x.shape[0], 6, -1)
        ).chunk(6, dim=1)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + self.cross_attn(x, y, samples)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class PixArt(nn.Module):
    """PixArt-alpha: latents x [B, C, H, W], y [B, 1, L, channels], mask [B, L]."""

    pos_embed: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        caption_channels: int,
        patch_size: int = 2,
        in_channels: int = 4,
    ) -> None:
        super().__init__()
        self.patch_size, self.out_channels = patch_size, 2 * in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        side = input_size // patch_size
        self.register_buffer("pos_embed", sincos_table(side, hidden_size), persistent=False)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, 120)
        self.blocks = nn.ModuleList(
            [PixArtBlock(hidden_size, num_heads, 4.0) for _ in range(depth)]
        )
        self.final_layer = T2IFinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        side = x.shape[-1] // self.patch_size
        x = self.x_embedder(x) + self.pos_embed
        t = self.t_embedder(timestep)
        t0 = self.t_block(t)
        y, samples = packed(self.y_embedder(y), mask)
        for block in self.blocks:
            x = checkpoint(block, x, y, t0, samples, use_reentrant=False)
        x = self.final_layer(x, t, None, None)
        pixels = x.unflatten(1, (side, side)).unflatten(3, (self.patch_size, self.patch_size, -1))
        return torch.einsum("nhwpqc->nchpwq", pixels).flatten(4, 5).flatten(2, 3)


class RotaryEmbedding(stdit3.RotaryEmbedding):
    """lucidrains/rotary-embedding-torch: a table that is written at the first call, and whenever a
    longer one is asked for.
    """

    cached: Tensor
    MOST = 64

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        self.register_buffer("cached", torch.zeros(self.MOST, head_dim), persistent=False)
        self.known = 0

    def forward(self, frames: int) -> stdit3.Rotation:
        if frames > self.known:
            places = torch.arange(frames).to(self.freqs.dtype)
            angles = torch.einsum("..., f -> ... f", places, self.freqs).repeat_interleave(2, -1)
            self.cached[:frames] = angles.detach()
            self.known = frames
        else:
            angles = self.cached[:frames].detach()
        return angles.cos(), angles.sin()


class OpenSora(STDiT3):
    """STDiT3 of Open-Sora 1.2 with the authors' way to read sizes and captions."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for block in (*self.spatial_blocks, *self.temporal_blocks):
            hidden, heads = block.cross_attn.q_linear.in_features, block.cross_attn.num_heads
            block.cross_attn = CrossAttention(hidden, heads)
        self.rope = RotaryEmbedding(2 * self.rope.freqs.shape[0])

    def scale(self, height: Tensor, width: Tensor) -> Any:
        return (height[0].item() * width[0].item()) ** 0.5 / self.input_sq_size

    def read(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        return packed(self.y_embedder(y), torch.ones_like(y[:1, 0, :, 0]) if mask is None else mask)

    def run_block(self, block: nn.Module, *given: Any) -> Tensor:
        return checkpoint(block, *given, use_reentrant=False)


def rope(ids: Tensor, dim: int, theta: int = 10000) -> Tensor:
    """Rotations [..., n, dim / 2, 2, 2] of positions [..., n]."""
    omega = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    out = torch.einsum("...n,d->...nd", ids, omega)
    out = torch.stack([torch.cos(out), -torch.sin(out), torch.sin(out), torch.cos(out)], dim=-1)
    return out.unflatten(-1, (2, 2)).float()


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    def turned(x: Tensor) -> Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
        return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).reshape(x.shape).type_as(x)

    return F.scaled_dot_product_attention(turned(q), turned(k), v).transpose(1, 2).flatten(2)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    args = (1000.0 * t)[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class MLPEmbedder(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(features, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x) * self.scale


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(dim, 3 * dim), QKNorm(dim // heads)
        self.proj = nn.Linear(dim, dim)


class Modulation(nn.Module):
    def __init__(self, dim: int, multiplier: int) -> None:
        super().__init__()
        self.lin, self.multiplier = nn.Linear(dim, multiplier * dim), multiplier

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None, :].chunk(self.multiplier, dim=-1)


class DoubleStreamBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(dim, 6))
            for norm in ("norm1", "norm2"):
                layer = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
                setattr(self, f"{stream}_{norm}", layer)
            setattr(self, f"{stream}_attn", SelfAttention(dim, heads))
            mlp = nn.Sequential(
                nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
            )
            setattr(self, f"{stream}_mlp", mlp)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        img_modulated = (1 + img_scale1) * self.img_norm1(img) + img_shift1
        img_q, img_k, img_v = self._qkv(self.img_attn, img_modulated)
        txt_modulated = (1 + txt_scale1) * self.txt_norm1(txt) + txt_shift1
        txt_q, txt_k, txt_v = self._qkv(self.txt_attn, txt_modulated)
        q, k = torch.cat((txt_q, img_q), dim=2), torch.cat((txt_k, img_k), dim=2)
        attn = attention(q, k, torch.cat((txt_v, img_v), dim=2), pe)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]
        img = img + img_gate1 * self.img_attn.proj(img_attn)
        img = img + img_gate2 * self.img_mlp((1 + img_scale2) * self.img_norm2(img) + img_shift2)
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attn)
        txt = txt + txt_gate2 * self.txt_mlp((1 + txt_scale2) * self.txt_norm2(txt) + txt_shift2)
        return img, txt

    def _qkv(self, own: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = own.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return *own.norm(q, k), v


class SingleStreamBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.hidden = heads, dim
        self.linear1, self.linear2 = nn.Linear(dim, 7 * dim), nn.Linear(5 * dim, dim)
        self.norm = QKNorm(dim // heads)
        self.pre_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(dim, 3)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        x_mod = (1 + scale) * self.pre_norm(x) + shift
        qkv, mlp = torch.split(self.linear1(x_mod), [3 * self.hidden, 4 * self.hidden], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = attention(*self.norm(q, k), v, pe)
        return x + gate * self.linear2(torch.cat((attn, self.mlp_act(mlp)), 2))


class LastLayer(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=1)
        return self.linear((1 + scale[:, None, :]) * self.norm_final(x) + shift[:, None, :])


class Flux(nn.Module):
    """FLUX.1-dev: img [B, N, C], txt [B, L, C'], ids [B, tokens, axes], y [B, D]."""

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        num_heads: int,
        depth: int,
        depth_single_blocks: int,
        context_in_dim: int,
        vec_in_dim: int,
        axes_dim: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.axes_dim = axes_dim
        self.img_in = nn.Linear(in_channels, hidden_size)
        self.txt_in = nn.Linear(context_in_dim, hidden_size)
        self.time_in = MLPEmbedder(256, hidden_size)
        self.vector_in = MLPEmbedder(vec_in_dim, hidden_size)
        self.guidance_in = MLPEmbedder(256, hidden_size)
        self.double_blocks = nn.ModuleList(
            [DoubleStreamBlock(hidden_size, num_heads) for _ in range(depth)]
        )
        self.single_blocks = nn.ModuleList(
            [SingleStreamBlock(hidden_size, num_heads) for _ in range(depth_single_blocks)]
        )
        self.final_layer = LastLayer(hidden_size, in_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = self.time_in(timestep_embedding(timesteps, 256))
        vec = vec + self.guidance_in(timestep_embedding(guidance, 256)) + self.vector_in(y)
        ids = torch.cat((txt_ids, img_ids), dim=1)
        turns = [rope(ids[..., at], dim) for at, dim in enumerate(self.axes_dim)]
        pe = torch.cat(turns, dim=-3).unsqueeze(1)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        return self.final_layer(img[:, txt.shape[1] :, ...], vec)
