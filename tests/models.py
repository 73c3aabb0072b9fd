"""Small models for the tests: a class-conditional DiT with the parameter names of
facebookresearch/DiT, and tiny ones to run.

In its style, and no release's: ``CrossDiT`` with cross-attention to a text, ``JointDiT`` with joint
attention of image and text.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

Model = TypeVar("Model", bound=nn.Module)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [B, N, C], shift and scale [B, C]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sincos_table(side: int, channels: int) -> Tensor:
    """Fixed position embedding of a side x side grid: [1, side * side, channels], half for the
    column, half for the row.
    """
    frequencies = 10000 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, channels).float()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding: x [..., D], angles that broadcast to [..., D / 2]."""
    one, other = x.chunk(2, dim=-1)
    return torch.cat(
        [one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()],
        dim=-1,
    )


class PatchEmbed(nn.Module):
    """Latents [B, C, H, W] -> tokens [B, N, hidden]."""

    def __init__(self, patch: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """As timm has it, dropout modules included."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(0.0)
        self.fc2 = nn.Linear(hidden, features)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Self-attention with one linear for q, k and v."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = (
            self.qkv(x)
            .reshape(batch, tokens, 3, self.num_heads, channels // self.num_heads)
            .permute(2, 0, 3, 1, 4)
        )
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(batch, tokens, channels)))


class TimestepEmbedder(nn.Module):
    """Sinusoids, then linear - SiLU - linear: an MLP that is no site."""

    def __init__(self, hidden: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        rates = torch.exp(
            -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        )
        angles = t[:, None].float() * rates[None]
        return self.mlp(
            torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype)
        )


class LabelEmbedder(nn.Module):
    """Classes and, last, the null class."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, hidden)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class DiTBlock(nn.Module):
    """stream + gate * module(modulate(norm(stream))), for attention and for the MLP."""

    def __init__(self, hidden: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden, int(hidden * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens -> patches of the output."""

    def __init__(self, hidden: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class OriginalDiT(nn.Module):
    """DiT as its authors released it, parameter names included: one embedder pair for all blocks,
    fused q, k, v.
    """

    def __init__(
        self,
        input_size: int = 16,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 32,
        depth: int = 4,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        num_classes: int = 10,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(
            sincos_table(input_size // patch_size, hidden_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            [DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, N, patch * patch * C] -> [B, C, H, W]."""
        side, patch = math.isqrt(x.shape[1]), self.patch_size
        pixels = x.reshape(x.shape[0], side, side, patch, patch, self.out_channels)
        return torch.einsum("bhwpqc->bchpwq", pixels).reshape(
            x.shape[0], self.out_channels, side * patch, side * patch
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))


class BrokenDiT(OriginalDiT):
    """The same, two blocks deep, with a graph break between them."""

    def __init__(self, **config: Any) -> None:
        super().__init__(depth=2, **config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.blocks[0](tokens, c)
        torch._dynamo.graph_break()
        return self.unpatchify(self.final_layer(self.blocks[1](tokens, c), c))


class CrossAttention(nn.Module):
    """From the tokens of an image to those of a text."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q = nn.Linear(features, features)
        self.kv = nn.Linear(features, 2 * features)
        self.proj = nn.Linear(features, features)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        query, key, value = (
            split_heads(part, self.num_heads)
            for part in (self.q(x), *self.kv(text).chunk(2, dim=2))
        )
        return self.proj(
            F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )


class CrossBlock(DiTBlock):
    """A DiT block with a cross-attention in its middle, which has no norm and no gate, as in
    PixArt.
    """

    def __init__(self, hidden: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(hidden, heads, mlp_ratio)
        self.cross = CrossAttention(hidden, heads)

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + self.cross(x, text)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class CrossDiT(nn.Module):
    """Latents [B, 4, H, W] and a text [B, T, hidden], read by cross-attention -> patches [B, N,
    16].
    """

    def __init__(self, hidden: int = 32, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.patch_size = 2
        self.x_embedder = PatchEmbed(self.patch_size, 4, hidden)
        self.t_embedder = TimestepEmbedder(hidden)
        self.blocks = nn.ModuleList([CrossBlock(hidden, heads, 4.0) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden, self.patch_size, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.x_embedder(x), self.t_embedder(t)
        for block in self.blocks:
            tokens = block(tokens, c, y)
        return self.final_layer(tokens, c)


class JointBlock(nn.Module):
    """A DiT block for the image and one for the text, whose attention is one: text first, as in
    FLUX's double blocks.
    """

    def __init__(self, hidden: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.image = DiTBlock(hidden, heads, mlp_ratio)
        self.text = DiTBlock(hidden, heads, mlp_ratio)

    def forward(
        self, image: Tensor, text: Tensor, c: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (
            torch.cat(both, dim=2)
            for both in zip(
                self._qkv(self.text, text, c), self._qkv(self.image, image, c), strict=True
            )
        )
        mixed = (
            F.scaled_dot_product_attention(rotate(query, angles), rotate(key, angles), value)
            .transpose(1, 2)
            .flatten(2)
        )
        for_text, for_image = mixed.split([text.shape[1], image.shape[1]], dim=1)
        return self._rest(self.image, image, for_image, c), self._rest(self.text, text, for_text, c)

    def _qkv(self, own: DiTBlock, stream: Tensor, c: Tensor) -> list[Tensor]:
        shift, scale = own.adaLN_modulation(c).chunk(6, dim=1)[:2]
        return [
            split_heads(part, own.attn.num_heads)
            for part in own.attn.qkv(modulate(own.norm1(stream), shift, scale)).chunk(3, dim=2)
        ]

    def _rest(self, own: DiTBlock, stream: Tensor, mixed: Tensor, c: Tensor) -> Tensor:
        gate_msa, shift_mlp, scale_mlp, gate_mlp = own.adaLN_modulation(c).chunk(6, dim=1)[2:]
        stream = stream + gate_msa.unsqueeze(1) * own.attn.proj(mixed)
        return stream + gate_mlp.unsqueeze(1) * own.mlp(
            modulate(own.norm2(stream), shift_mlp, scale_mlp)
        )


class JointDiT(nn.Module):
    """Latents [B, 4, H, W] and a text [B, T, hidden], two streams -> patches of both [B, T + N,
    16], so that no block's text is unused.
    """

    def __init__(self, hidden: int = 32, depth: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.patch_size, self.head_size = 2, hidden // heads
        self.x_embedder = PatchEmbed(self.patch_size, 4, hidden)
        self.t_embedder = TimestepEmbedder(hidden)
        self.blocks = nn.ModuleList([JointBlock(hidden, heads, 4.0) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden, self.patch_size, 4)

    def angles(self, tokens: int) -> Tensor:
        """Of the rotary embedding: [tokens, head_size / 2]."""
        rates = 100 ** -torch.linspace(0, 1, self.head_size // 2, dtype=torch.float64)
        return torch.arange(tokens)[:, None] * rates

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        image, text, c = self.x_embedder(x), y, self.t_embedder(t)
        angles = self.angles(image.shape[1] + text.shape[1]).to(image.dtype)
        for block in self.blocks:
            image, text = block(image, text, c, angles)
        return self.final_layer(torch.cat([text, image], dim=1), c)


SmallModel = DiTTransformer2DModel | OriginalDiT | CrossDiT | JointDiT


def randomize(model: Model, seed: int) -> Model:
    """Eval mode, and weights that leave nothing degenerate: modulations and gates of about 0.5,
    attention maps far from uniform.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                module.weight.copy_(
                    torch.randn(module.weight.shape, generator=generator) * (1.5 / fan_in**0.5)
                )
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return model.eval().requires_grad_(False)


def tiny_dit(seed: int = 0, **overrides: Any) -> DiTTransformer2DModel:
    """A small random diffusers DiT in eval mode: by default 4 blocks, 2 heads of 16, 64 tokens of a
    16 x 16 latent.
    """
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 4,
        "sample_size": 16,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "norm_eps": 1e-6,
    }
    return randomize(DiTTransformer2DModel(**{**settings, **overrides}), seed)


def tiny_original_dit(seed: int = 0, **overrides: Any) -> OriginalDiT:
    """The same size with the module structure of facebookresearch/DiT."""
    return randomize(OriginalDiT(**overrides), seed)
