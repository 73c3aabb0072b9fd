"""The forward passes of the small models, written out, with every attention and MLP handed to the
reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from tests.models import CrossDiT, DiTBlock, FinalLayer, JointDiT, OriginalDiT, SmallModel, rotate

if TYPE_CHECKING:
    from tests.reference import ReferenceSampler


@dataclass
class Part:
    """One stream's part in an attention: q, k and v of its tokens [B, N, H, D], and the projection
    of [B, N, H * D].

    In a cross-attention k and v are those of the text.
    """

    stream: str
    path: str
    query: Tensor
    key: Tensor
    value: Tensor
    project: Callable[[Tensor], Tensor]


def walk(run: ReferenceSampler, model: SmallModel, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """What ``model`` makes of latents, timesteps, and labels or texts."""
    if isinstance(model, DiTTransformer2DModel):
        return _diffusers_dit(run, model, x, t, y)
    if isinstance(model, OriginalDiT):
        return _original_dit(run, model, x, t, y)
    return (
        _cross_dit(run, model, x, t, y)
        if isinstance(model, CrossDiT)
        else _joint_dit(run, model, x, t, y)
    )


def _diffusers_dit(
    run: ReferenceSampler, model: DiTTransformer2DModel, x: Tensor, t: Tensor, y: Tensor
) -> Tensor:
    patch = model.config.patch_size
    run.grids["image"] = _grid(x, patch)
    tokens = model.pos_embed(x)
    for layer, block in enumerate(model.transformer_blocks):
        path, attn = f"transformer_blocks.{layer}", block.attn1
        modulation = block.norm1.linear(
            F.silu(block.norm1.emb(t, y, hidden_dtype=tokens.dtype))
        ).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            part[:, None] for part in modulation
        )
        normed = block.norm1.norm(tokens) * (1 + scale_msa) + shift_msa
        query, key, value = (
            linear(normed).unflatten(2, (attn.heads, -1))
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        (mixed,) = run.attention(
            "self_attention",
            layer,
            [Part("image", f"{path}.attn1", query, key, value, attn.to_out[0])],
        )
        tokens = tokens + gate_msa * mixed
        tokens = tokens + gate_mlp * run.mlp(
            f"{path}.ff",
            layer,
            "image",
            block.ff(block.norm3(tokens) * (1 + scale_mlp) + shift_mlp),
        )
    tokens = run.state(tokens)
    condition = model.transformer_blocks[0].norm1.emb(t, y, hidden_dtype=tokens.dtype)
    shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
    patches = model.proj_out_2(model.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
    return _unpatch(patches, patch, model.out_channels)


def _original_dit(
    run: ReferenceSampler, model: OriginalDiT, x: Tensor, t: Tensor, y: Tensor
) -> Tensor:
    run.grids["image"] = _grid(x, model.patch_size)
    tokens, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)
    for layer, block in enumerate(model.blocks):
        path = f"blocks.{layer}"
        (mixed,) = run.attention(
            "self_attention", layer, [_part("image", f"{path}.attn", block, tokens, c)]
        )
        tokens = _with_mlp(
            run, "image", f"{path}.mlp", layer, block, tokens + _modulation(block, c)[2] * mixed, c
        )
    return _unpatch(
        _final(model.final_layer, run.state(tokens), c), model.patch_size, model.out_channels
    )


def _cross_dit(run: ReferenceSampler, model: CrossDiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    run.grids["image"] = _grid(x, model.patch_size)
    tokens, c = model.x_embedder(x), model.t_embedder(t)
    for layer, block in enumerate(model.blocks):
        path, cross = f"blocks.{layer}", block.cross
        (mixed,) = run.attention(
            "self_attention", layer, [_part("image", f"{path}.attn", block, tokens, c)]
        )
        tokens = tokens + _modulation(block, c)[2] * mixed
        query, key, value = (
            part.unflatten(2, (cross.num_heads, -1))
            for part in (cross.q(tokens), *cross.kv(y).chunk(2, dim=2))
        )
        (mixed,) = run.attention(
            "cross_attention",
            layer,
            [Part("image", f"{path}.cross", query, key, value, cross.proj)],
        )
        tokens = _with_mlp(run, "image", f"{path}.mlp", layer, block, tokens + mixed, c)
    return _final(model.final_layer, run.state(tokens), c)


def _joint_dit(run: ReferenceSampler, model: JointDiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    run.grids["image"] = _grid(x, model.patch_size)
    streams, c = {"text": y, "image": model.x_embedder(x)}, model.t_embedder(t)
    angles = model.angles(sum(tokens.shape[1] for tokens in streams.values()))
    for layer, block in enumerate(model.blocks):
        own = {"text": block.text, "image": block.image}
        parts, position = [], 0
        for stream, tokens in streams.items():
            part = _part(stream, f"blocks.{layer}.{stream}.attn.proj", own[stream], tokens, c)
            turn = angles[position : position + tokens.shape[1], None]
            part.query, part.key = rotate(part.query, turn), rotate(part.key, turn)
            parts.append(part)
            position += tokens.shape[1]
        for part, mixed in zip(parts, run.attention("joint_attention", layer, parts), strict=True):
            stream, gate = part.stream, _modulation(own[part.stream], c)[2]
            streams[stream] = _with_mlp(
                run,
                stream,
                f"blocks.{layer}.{stream}.mlp",
                layer,
                own[stream],
                streams[stream] + gate * mixed,
                c,
            )
    return _final(model.final_layer, run.state(torch.cat(list(streams.values()), dim=1)), c)


def _grid(x: Tensor, patch: int) -> tuple[int, int]:
    return x.shape[2] // patch, x.shape[3] // patch


def _modulation(block: DiTBlock, c: Tensor) -> list[Tensor]:
    """Shift, scale and gate of the attention, then of the MLP: [B, 1, C] each."""
    return [part[:, None] for part in block.adaLN_modulation(c).chunk(6, dim=1)]


def _part(stream: str, path: str, block: DiTBlock, tokens: Tensor, c: Tensor) -> Part:
    shift, scale = _modulation(block, c)[:2]
    qkv = block.attn.qkv(block.norm1(tokens) * (1 + scale) + shift).unflatten(
        2, (3, block.attn.num_heads, -1)
    )
    return Part(stream, path, *qkv.unbind(2), block.attn.proj)


def _with_mlp(
    run: ReferenceSampler,
    stream: str,
    path: str,
    layer: int,
    block: DiTBlock,
    tokens: Tensor,
    c: Tensor,
) -> Tensor:
    shift, scale, gate = _modulation(block, c)[3:]
    hidden = block.mlp.fc1(block.norm2(tokens) * (1 + scale) + shift)
    return tokens + gate * run.mlp(
        path, layer, stream, block.mlp.fc2(F.gelu(hidden, approximate="tanh"))
    )


def _final(layer: FinalLayer, tokens: Tensor, c: Tensor) -> Tensor:
    shift, scale = layer.adaLN_modulation(c).chunk(2, dim=1)
    return layer.linear(layer.norm_final(tokens) * (1 + scale[:, None]) + shift[:, None])


def _unpatch(patches: Tensor, patch: int, channels: int) -> Tensor:
    side = math.isqrt(patches.shape[1])
    image = patches.new_empty(patches.shape[0], channels, side * patch, side * patch)
    for token in range(patches.shape[1]):
        row, column = divmod(token, side)
        pixels = patches[:, token].reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
        image[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = pixels
    return image
