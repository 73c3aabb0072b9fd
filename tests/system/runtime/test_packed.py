"""Attention of a whole batch in one row, samples kept apart by a mask (PixArt, Open-Sora), gives
the scores, the selections and the results of attention sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toca_fx
from tests.helpers import capture, make_policy, picked_tokens
from tests.marks import slow_but
from tests.models import Mlp, randomize
from toca_fx.capture.aten import to_aten
from toca_fx.match.matcher import match

pytestmark = pytest.mark.usefixtures("keep_memories")

TOKENS, TEXT, WIDTH, HEADS, STEPS = 16, 5, 32, 2, 6

Mix = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Query, key, value [1, heads, tokens, width] and a mask [queries, keys] -> the query's shape."""


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask)


def fused_with_bias(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, bias[None, None])


def spelled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def in_three_axes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (operand.flatten(0, 1) for operand in (query, key, value))
    logits = torch.bmm(q, k.transpose(1, 2)) * query.shape[-1] ** -0.5
    return torch.bmm((logits + torch.where(mask, 0.0, -torch.inf)).softmax(-1), v)[None]


PACKED: dict[str, Mix] = {
    "fused": fused,
    "fused with a bias": fused_with_bias,
    "spelled out": spelled,
    "spelled out in three axes": in_three_axes,
}


class Attend(nn.Module):
    """Attention from x [B, N, C] to y [B, M, C]: sample by sample without ``mix``."""

    def __init__(self, mix: Mix | None) -> None:
        super().__init__()
        self.mix = mix
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        batch, tokens, keys = x.shape[0], x.shape[1], y.shape[1]
        rows = batch if self.mix is None else 1
        query = self.q(x).view(rows, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
        both = self.kv(y).view(rows, -1, 2, HEADS, WIDTH // HEADS)
        key, value = both.permute(2, 0, 3, 1, 4).unbind(0)
        if self.mix is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            apart = torch.block_diag(*[torch.ones(tokens, keys)] * batch).bool()
            mixed = self.mix(query, key, value, apart)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self, mix: Mix | None, packed: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attend(mix if packed == "self" else None)
        self.cross = Attend(mix if packed == "cross" else None)
        self.mlp = Mlp(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + t * self.attn(normed, normed)
        x = x + self.cross(x, y)
        return x + t * self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, mix: Mix | None = None, packed: str = "cross") -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(mix, packed)])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, y, t[:, None, None])
        return x


def policy(**sections: Any) -> toca_fx.Policy:
    return make_policy(sampler={"steps": STEPS}, N={"base": 3}, **sections)


BY_CROSS = {
    "modules": {"cross_attention": {"weight": 0.8}, "mlp": {"weight": 1.2}},
    "scores": {"cross_attention": 1.0, "staleness": 0.05},
}
BY_SELF = {"scores": {"self_attention": 1.0, "staleness": 0.05}}
PARTIAL_SELF = {**BY_SELF, "modules": {"self_attention": {"weight": 1.0}, "mlp": {"weight": 1.2}}}
SHARED = {"guidance": {"layout": "batched", "selection": "shared"}}


POLICIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "entropy": ("cross", BY_CROSS),
    "entropy of both guidance halves": ("cross", {**BY_CROSS, **SHARED}),
    "influence": ("self", BY_SELF),
    "influence, attention for fresh tokens": ("self", PARTIAL_SELF),
}
RUNS = [
    (mix, name)
    for mix in PACKED
    for name in POLICIES
    if "fresh" not in name or "fused" in mix  # keys are kept for fused attention only
]


OFTEN = [("fused", name) for name in POLICIES] + [("spelled out in three axes", "entropy")]


@pytest.mark.parametrize(("mix", "name"), slow_but(OFTEN, RUNS, "the same, spelled otherwise"))
def test_one_row_of_all_samples_is_as_each_by_itself(mix: str, name: str) -> None:
    packed, sections = POLICIES[name]
    apart, together = (
        randomize(Model(spelling, packed), seed=0).double() for spelling in (None, PACKED[mix])
    )
    fast, expected = (
        toca_fx.compile(model, policy(**sections), inner="eager") for model in (together, apart)
    )
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, TEXT, WIDTH, generator=generator, dtype=torch.float64)
    found: list[list[Tensor]] = []
    chosen: list[list[Any]] = []
    for model in (fast, expected):
        generator.manual_seed(1)
        found.append([])
        chosen.append([])
        with torch.no_grad(), toca_fx.session(STEPS) as run:
            for call in range(STEPS):
                x = torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
                t = torch.full((2,), 0.9 - 0.1 * call, dtype=torch.float64)
                found[-1].append(model(x, t, y))
                chosen[-1].append(picked_tokens(run))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert chosen[0] == chosen[1]
    assert sum(map(bool, chosen[0])) == STEPS * 2 // 3


def test_more_keys_than_tokens_tell_nothing_of_them() -> None:
    """A map of samples in one row whose keys go on behind the tokens has no columns for each."""

    class Longer(Attend):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            batch, tokens, _ = x.shape
            longer = torch.cat([self.kv(y).view(1, -1, 2 * WIDTH), self.kv(y[:1, :2])], dim=1)
            query = self.q(x).view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            both = longer.view(1, -1, 2, HEADS, WIDTH // HEADS)
            key, value = both.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(query, key, value)
            return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))

    model = Model()
    for block in model.blocks:
        block.attn = Longer(None)
    given = torch.randn(2, TOKENS, WIDTH), torch.rand(2), torch.randn(2, TEXT, WIDTH)
    sites = match(to_aten(*capture(model, *given)).graph).sites
    assert {site.influence for site in sites} == {None}
    assert all(site.entropy is not None for site in sites)
