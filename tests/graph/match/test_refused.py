"""What looks like an attention or an MLP and is refused: a near miss says why, in ``explain``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toca_fx
from tests.helpers import capture, make_policy
from tests.spellings.attentions import Attention, Mix, sdpa
from tests.spellings.mlps import Mlp
from tests.spellings.models import make
from tests.spellings.sizes import SCALE, SIDE, WIDTH
from toca_fx.capture.aten import to_aten
from toca_fx.graph.stream import Flow
from toca_fx.match.anchors import attention_at
from toca_fx.match.matcher import match
from toca_fx.match.origins import Rows, rows_of
from toca_fx.match.sites import Matches
from toca_fx.plan.planner import make_plan

NO_ATTENTION = "no softmax attention and no linear-activation-linear in it"


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys times queries, and the product turned."""
    return (k * SCALE @ q.mT).mT.softmax(-1) @ v


def one_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax with one more in the denominator."""
    weights = (q @ k.mT * SCALE).exp()
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


def other_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhnd,bhmd->bnmh", q, k).softmax(2)
    return torch.einsum("bnmh,bhmd->bhnd", weights, v)


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-2) @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT * SCALE) @ v


def misplaced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sink behind the keys, and the weight of the first key is thrown away."""
    scores = torch.cat([q @ k.mT * SCALE, torch.zeros_like(q[..., :1])], dim=-1)
    return scores.softmax(-1)[..., 1:] @ v


def rows_of_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All samples in one row, token by token: the map has no rows of a sample that lie together."""
    batch, heads, tokens, _ = q.shape
    q, k, v = (operand.permute(1, 2, 0, 3).flatten(1, 2)[None] for operand in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.view(heads, tokens, batch, -1).permute(2, 0, 1, 3)


def rows_of_samples(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, tokens, _ = q.shape
    q, k, v = (operand.transpose(0, 1).flatten(1, 2)[None] for operand in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.view(heads, batch, tokens, -1).transpose(0, 1)


@pytest.mark.parametrize(
    ("mix", "expected"), [(rows_of_samples, Rows(0, packed=True)), (rows_of_tokens, None)]
)
def test_one_row_of_all_samples_is_read_sample_by_sample(mix: Mix, expected: Rows | None) -> None:
    model, steps = make(mix=mix)
    graph = to_aten(*capture(model.eval().requires_grad_(False), steps[0])).graph
    site = match(graph).sites[0]
    nodes = {node.name: node for node in graph.nodes}
    attention = attention_at(nodes[site.anchor])
    assert attention is not None
    assert rows_of(attention, nodes[site.output], site.shape, Flow(graph)) == expected
    assert (site.packed, site.segment) == ((True, 0) if expected else (False, None))


def typed_like_the_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of the query, only its dtype goes around the attention."""
    normed = F.rms_norm(F.silu(q), (q.shape[-1],))
    return F.scaled_dot_product_attention(normed, k, v).type_as(normed)


def test_the_dtype_of_a_query_is_no_mlp() -> None:
    found = matches_of(*make(mix=typed_like_the_query))
    assert not found.misses


@pytest.mark.parametrize(
    "mix", [turned, one_more, other_axis, over_queries, sigmoid], ids=lambda mix: mix.__name__
)
def test_no_attention(mix: Mix) -> None:
    found = matches_of(*make(mix=mix))
    assert {site.kind for site in found.sites} == {"mlp"}
    assert [miss.kind for miss in found.misses] == ["module"] * 2
    assert all(miss.reason.startswith(NO_ATTENTION) for miss in found.misses)


def test_the_weights_of_other_keys() -> None:
    found = matches_of(*make(mix=misplaced))
    assert {site.kind for site in found.sites} == {"mlp"}


class TokensNormed(Mlp):
    """A norm over all tokens (GRN of ConvNeXt v2)."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        spread = h.norm(dim=1, keepdim=True)
        return self.down(h * spread / (spread.mean(-1, keepdim=True) + 1e-6))


def test_an_mlp_with_a_norm_over_tokens() -> None:
    """It is reused as a whole where others compute tokens."""
    found = matches_of(*make(mlp=TokensNormed))
    assert [site.path for site in found.sites if site.whole] == ["blocks.0.mlp", "blocks.1.mlp"]
    plan = make_plan(found, make_policy(sampler={"steps": 3}))
    assert [step.modes for step in plan.steps] == [("full",) * 4, *[("reuse",) * 4] * 2]
    assert [(miss.kind, miss.path) for miss in found.misses] == [
        ("mlp", f"blocks.{i}.mlp") for i in range(2)
    ]
    assert all("may mix tokens" in miss.reason for miss in found.misses)


class Deep(Attention):
    """Queries, keys and values of linear - activation - linear."""

    def __init__(self) -> None:
        super().__init__(sdpa, nn.Linear)
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.silu(self.first(x)))


def test_the_mlp_in_front_of_an_attention_is_part_of_it() -> None:
    found = matches_of(*make(attention=Deep))
    assert [site.kind for site in found.sites] == ["self_attention", "mlp"] * 2
    assert not found.misses


class ImageBlock(nn.Module):
    """Attention over tokens in a row, and an MLP over an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels  # their axis
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(sdpa, nn.Linear), Mlp()
        self.up, self.down = nn.Conv2d(WIDTH, 32, 1), nn.Conv2d(32, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(self.channels, -1)
        attended = self.attention(self.norm(last).flatten(1, 2))
        x = x + attended.view_as(last).movedim(-1, self.channels)
        if self.channels == 1:
            return x + self.down(F.gelu(self.up(x)))
        return x + self.mlp(self.norm(x))


class Trunk(nn.Module):
    """``parts`` one after the other, by names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.names = list(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class Residual(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.norm, self.part = nn.LayerNorm(WIDTH), part

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(self.norm(x))


@pytest.mark.parametrize(
    ("channels", "shape", "reason"),
    [
        (1, (2, WIDTH, SIDE, SIDE), "channels come before tokens"),
        (3, (2, SIDE, SIDE, WIDTH), "not [batch, tokens, channels]"),
    ],
)
def test_an_mlp_of_an_image(channels: int, shape: tuple[int, ...], reason: str) -> None:
    blocks = nn.ModuleList([ImageBlock(channels), ImageBlock(channels)])
    found = matches_of(nn.Sequential(*blocks), [torch.randn(shape)])
    assert {(site.kind, site.shape) for site in found.sites} == {
        ("self_attention", (2, SIDE * SIDE, WIDTH))
    }
    assert [miss.kind for miss in found.misses] == ["mlp"] * len(blocks)
    assert all(str(shape) in miss.reason and reason in miss.reason for miss in found.misses)


def attention() -> nn.Module:
    return Residual(Attention(sdpa, nn.Linear))


@pytest.mark.parametrize(
    ("made", "kinds"),
    [
        (lambda: Trunk(only=attention()), ["self_attention"]),
        (lambda: Trunk(only=Residual(Mlp())), ["mlp"]),
        (lambda: Residual(Mlp()), ["mlp"]),
        (lambda: Trunk(one=nn.Sequential(nn.Linear(WIDTH, WIDTH)), two=attention()), None),
    ],
    ids=["an attention", "an MLP", "the whole model", "beside something else"],
)
def test_what_stands_alone(made: Callable[[], nn.Module], kinds: list[str] | None) -> None:
    found = matches_of(made(), [torch.randn(2, SIDE * SIDE, WIDTH)])
    assert found.sites == ()
    assert [miss.kind for miss in found.misses] == (kinds or ["self_attention"])
    assert all("outside the numbered blocks" in miss.reason for miss in found.misses)


def test_explain_says_why() -> None:
    model, (x, *_) = make()
    model = Trunk(blocks=model, head=Residual(Mlp())).double().eval().requires_grad_(False)
    policy = make_policy(modules={"mlp": {"weight": 1.0}}, scores={"staleness": 1.0})
    said = toca_fx.explain(model, policy, x)
    assert [(skipped.kind, skipped.path) for skipped in said.skipped] == [("mlp", "head.part")]
    assert "no module like it beside it" in str(said)


def matches_of(model: nn.Module, steps: list[Tensor]) -> Matches:
    captured, inputs = capture(model.eval().requires_grad_(False), steps[0])
    return match(to_aten(captured, inputs).graph)
