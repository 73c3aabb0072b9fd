"""flex_attention is one operator: a site, which judges no tokens where positions matter to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import toca_fx
from tests.helpers import make_policy, programs
from tests.marks import slow_but
from toca_fx.graph.ops import FLEX

STEPS, TOKENS, WIDTH = 6, 16, 32
BIAS = torch.linspace(-1, 1, TOKENS * TOKENS).view(TOKENS, TOKENS)

Mod = Callable[..., Tensor]


def plain(x: Tensor) -> dict[str, Any]:
    return {}


def scaled(x: Tensor) -> dict[str, Any]:
    return {"scale": 0.5}


def bias_by_position(x: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda score, b, h, q, kv: score + BIAS[q, kv]}


def capped(x: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda score, b, h, q, kv: 5 * torch.tanh(score / 5)}


def masked(x: Tensor) -> dict[str, Any]:
    mask = create_block_mask(
        lambda b, h, q, kv: q >= kv, None, None, TOKENS, TOKENS, device="cpu", BLOCK_SIZE=4
    )
    return {"block_mask": mask}


class Block(nn.Module):
    def __init__(self, mods: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.mods = mods
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.ff = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = flex_attention(q, k, v, **self.mods(x))
        assert isinstance(mixed, Tensor)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.ff(x)


class Model(nn.Module):
    def __init__(self, mods: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(mods) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + t[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x


def make(mods: Callable[[Tensor], dict[str, Any]]) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = Model(mods).eval().requires_grad_(False)
    return model, [(torch.randn(2, TOKENS, WIDTH), torch.full((2,), t / STEPS)) for t in range(6)]


def run(model: nn.Module, calls: list[Any], base: int, inner: str = "eager") -> Any:
    torch._dynamo.reset()
    policy = make_policy(sampler={"steps": STEPS}, N={"base": base})
    fast = toca_fx.compile(model, policy, inner=inner)
    with torch.no_grad(), toca_fx.session(num_steps=STEPS) as session:
        return [fast(*call).clone() for call in calls], session


@pytest.mark.parametrize(
    "mods",
    slow_but(
        [plain, bias_by_position, masked],
        [plain, scaled, bias_by_position, capped, masked],
        "without code, with a function of scores, with a mask are the kinds",
    ),
    ids=lambda mods: mods.__name__,
)
def test_flex_attention_is_a_site(mods: Callable[[Tensor], dict[str, Any]]) -> None:
    model, calls = make(mods)
    outputs, _ = run(model, calls, 1)
    assert all(torch.equal(ours, model(*call)) for ours, call in zip(outputs, calls, strict=True))
    outputs, session = run(model, calls, 3)
    assert dict(session.report().kinds) == {"full": 2, "partial": 4}
    assert not torch.equal(outputs[1], model(*calls[1]))
    (program,) = programs(session)
    graph, sites = program.analysis.aten.graph, program.analysis.matches.sites
    assert len(graph.find_nodes(op="call_function", target=FLEX)) == 2
    assert [site.kind for site in sites] == ["self_attention", "mlp"] * 2
    # What a mask or a function of scores does to the map is not known: it judges no tokens.
    judges = mods in (plain, scaled)
    assert [site.influence is not None for site in sites] == [judges] * 4


@pytest.mark.slow(reason="inductor takes half a minute")
def test_equal_blocks_with_code_are_compiled_once() -> None:
    model, calls = make(capped)
    outputs, session = run(model, calls, 3, "inductor")
    expected, _ = run(model, calls, 3)
    for ours, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4)
    assert dict(session.report().kinds) == {"full": 2, "partial": 4}
