"""Attentions in all spellings: how queries, keys and values are mixed, and where they come from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import toca_fx
from tests.spellings.sizes import HEADS, SCALE, SIDE, WIDTH
from tools.pipelines.ways.attention import efficient, flash, sage


@torch.library.custom_op("toca_fx_tests::attention_bhnd", mutates_args=())
def attention_bhnd(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value).contiguous()


@attention_bhnd.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("toca_fx_tests::attention_bnhd", mutates_args=())
def attention_bnhd(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = (operand.transpose(1, 2) for operand in (query, key, value))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).contiguous()


@attention_bnhd.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


toca_fx.register_attention(attention_bhnd)
toca_fx.register_attention(torch.ops.toca_fx_tests.attention_bnhd, layout="bnhd")

# attention of q, k and v [B, H, N, D]

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2], dtype=q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=-(places[:, None] - places).abs() / 4)


def sdpa_with_boolean_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(places[:, None] - places).abs() < 5)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * SCALE) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def scaled_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ (k * SCALE).mT, dim=-1) @ v


def scaled_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(2, 3)) / SCALE**-1, -1) @ v


def merged_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (operand.flatten(0, 1) for operand in (q, k, v))
    nothing = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, HEADS))


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bhnd,bhmd->bhnm", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v)


def einsum_by_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads behind tokens, as the heads of a projection lie."""
    q, k, v = (operand.transpose(1, 2) for operand in (q, k, v))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).transpose(1, 2)


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 5 * torch.tanh(q @ k.mT * SCALE / 5)
    return scores.softmax(-1) @ v


def masked_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    far = (places[:, None] - places).abs() > 5
    return (q @ k.mT * SCALE).masked_fill(far, -torch.inf).softmax(-1) @ v


def product_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias by relative position that is a product of the queries too (SAM, MViT)."""
    rows = torch.einsum("bhnd,md->bhnm", q, torch.ones(SIDE, q.shape[3], dtype=q.dtype))
    scores = (q @ k.mT * SCALE).unflatten(-1, (SIDE, SIDE)) + rows[..., None] / 4
    return scores.flatten(-2).softmax(-1) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A logit that belongs to no key, beside those of the keys (gpt-oss)."""
    scores = q @ k.mT * SCALE
    sink = torch.full((1, q.shape[1], 1, 1), 0.5, dtype=q.dtype)
    both = torch.cat([scores, sink.expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
    return both.softmax(-1)[..., :-1] @ v


def sinks_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    both = torch.cat([torch.zeros_like(scores[..., :2]), scores], dim=-1)
    return both.softmax(-1)[..., 2:] @ v


def normalized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cosine attention."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, scale=3.0)


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotary embeddings by halves, flipped pairs and chosen channels: they turn a head alike."""
    half = q.shape[-1] // 2
    angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None] / 7
    order = torch.arange(2 * half - 1, -1, -1)
    q = q * angle.cos() + q.roll(half, -1) * angle.sin()
    k = k * angle.cos() + k[..., order] * angle.sin()
    return F.scaled_dot_product_attention(q, k.flip(-1), v)


def registered_bhnd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_bhnd(q, k, v)


def registered_bnhd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (operand.transpose(1, 2) for operand in (q, k, v))
    return torch.ops.toca_fx_tests.attention_bnhd(*heads).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = flex_attention(q, k, v)
    assert isinstance(mixed, Tensor)
    return mixed


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (operand.transpose(1, 2) for operand in (q, k, v))
    return flash(*heads, SCALE)[0].transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (operand.transpose(1, 2) for operand in (q, k, v))
    mixed = efficient(*heads, None)
    return mixed[0].transpose(1, 2)


def sage_heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sage(q, k, v)


def sage_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (operand.transpose(1, 2) for operand in (q, k, v))
    return sage(*heads, "NHD").transpose(1, 2)


MIXES: tuple[Mix, ...] = (
    sdpa,
    sdpa_with_bias,
    sdpa_with_boolean_mask,
    grouped,
    scaled_query,
    scaled_key,
    scaled_product,
    merged_baddbmm,
    einsum,
    einsum_by_token,
    soft_cap,
    masked_product,
    product_bias,
    sinks,
    sinks_first,
    normalized,
    rotated,
    registered_bhnd,
    registered_bnhd,
    flex,
    flash_attention,
    xformers,
    sage_heads_first,
    sage_tokens_first,
)


class Attention(nn.Module):
    def __init__(self, mix: Mix, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.mix = mix
        self.q, self.k, self.v, self.out = (linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        return self.out(self.mix(*heads).transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    """torch's own, which flattens tokens and samples token by token."""

    def __init__(self, need_weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.need_weights, self.batch_first = need_weights, batch_first
        self.heads = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.heads(x, x, x, need_weights=self.need_weights)[0]
        return out if self.batch_first else out.transpose(0, 1)


class Flattened(Attention):
    """Projections of flattened tokens, and a norm over groups of channels in each of them."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        q, k, v = (
            linear(flat).reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q = F.group_norm(q.transpose(1, 2).reshape(-1, WIDTH), HEADS)
        q = q.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)
        out = self.mix(q, k, v).transpose(1, 2).reshape(-1, WIDTH)
        return self.out(out).view_as(x)


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "multihead": lambda: Multihead(need_weights=False, batch_first=True),
    "multihead with its map": lambda: Multihead(need_weights=True, batch_first=True),
    "multihead, tokens first": lambda: Multihead(need_weights=False, batch_first=False),
    "multihead with its map, tokens first": lambda: Multihead(True, False),
    "flattened": lambda: Flattened(sdpa, nn.Linear),
}
