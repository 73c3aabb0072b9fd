"""Operators that torch takes apart when they are called, or whose fake ones broadcast in Python, on
a number of tokens that is a symbol: modulation by ``addcmul`` is all of ComfyUI's model code.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toca_fx
from tests.helpers import make_policy
from tests.marks import slow_but

WIDTH, TOKENS = 16, 12
# Normed tokens [B, N, 16], shift and scale [B, 1, 16].
Modulate = Callable[[Tensor, Tensor, Tensor], Tensor]

SPELLINGS: dict[str, Modulate] = {
    "addcmul": lambda x, shift, scale: torch.addcmul(shift, x, 1 + scale),
    "addcmul by a number": lambda x, shift, scale: torch.addcmul(shift, x, scale, value=0.5),
    "addcdiv": lambda x, shift, scale: torch.addcdiv(shift, x, 2 + scale.abs()),
    "lerp": lambda x, shift, scale: torch.lerp(shift, x, scale),
    "lerp by a number": lambda x, shift, scale: torch.lerp(shift, x * scale, 0.3),
    "rms_norm": lambda x, shift, scale: F.rms_norm(x, (WIDTH,)) * scale + shift,
    "rms_norm with a weight": lambda x, shift, scale: F.rms_norm(x, (WIDTH,), scale[0, 0]) + shift,
    "group_norm": lambda x, shift, _: F.group_norm(x.reshape(-1, WIDTH), 4).view_as(x) + shift,
    "group_norm of all tokens": lambda x, shift, _: F.group_norm(x.mT, 4).mT + shift,
    "instance_norm": lambda x, shift, _: F.instance_norm(x) + shift,
    "normalize": lambda x, shift, scale: F.normalize(x, dim=-1) * scale + shift,
    "cosine_similarity": lambda x, shift, _: (
        x * F.cosine_similarity(x, shift.expand_as(x), dim=-1)[..., None]
    ),
    "var_mean": lambda x, shift, _: x * torch.var_mean(x, -1, keepdim=True)[0] + shift,
    "log_softmax": lambda x, shift, _: F.log_softmax(x, -1) + shift,
    "clamp": lambda x, shift, _: torch.clamp(x, shift - 1, shift + 1),
    "where": lambda x, shift, scale: torch.where(x > 0, x * scale, shift),
    "hypot": lambda x, shift, _: torch.hypot(x, shift),
    "logaddexp": lambda x, shift, _: torch.logaddexp(x, shift),
    "float_power": lambda x, shift, _: torch.float_power(x.abs(), 2.0) + shift,
    "smooth_l1_loss": lambda x, shift, _: F.smooth_l1_loss(x, shift.expand_as(x), reduction="none"),
    "einsum": lambda x, shift, scale: torch.einsum("bnd,bd->bnd", x, scale[:, 0]) + shift,
    "tensordot": lambda x, shift, _: torch.tensordot(x, _eye(x), dims=([2], [0])) + shift,
    "inner": lambda x, shift, _: torch.inner(x, _eye(x)) + shift,
    "addmm": lambda x, shift, _: torch.addmm(shift[0, 0], x.flatten(0, 1), _eye(x)).view_as(x),
    "kron": lambda x, shift, _: torch.kron(x, x.new_ones(1, 1, 1)) + shift,
    "tile": lambda x, shift, _: x.tile(1, 1, 2)[..., :WIDTH] + shift,
    "pad": lambda x, shift, _: F.pad(x, (0, 2))[..., 2:] + shift,
    "glu": lambda x, shift, _: F.glu(torch.cat([x, x], -1)) + shift,
    "cross": lambda x, shift, _: (
        torch.linalg.cross(x[..., :3], x[..., 3:6]).sum(-1, keepdim=True) + x + shift
    ),
    "embedding": lambda x, shift, _: F.embedding((x[..., 0] > 0).long(), _eye(x)) + x + shift,
}
OFTEN = ("addcmul", "addcdiv", "lerp", "lerp by a number", "rms_norm", "group_norm", "normalize")


def _eye(x: Tensor) -> Tensor:
    return torch.eye(WIDTH, dtype=x.dtype)


class Block(nn.Module):
    def __init__(self, modulate: Modulate) -> None:
        super().__init__()
        self.modulate, self.norm = modulate, nn.LayerNorm(WIDTH)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, -1)
        return x + self.mlp(self.modulate(self.norm(x), shift, scale))


class Model(nn.Module):
    def __init__(self, modulate: Modulate) -> None:
        super().__init__()
        self.blocks, self.embedder = nn.ModuleList([Block(modulate)]), nn.Linear(1, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.blocks[0](x, self.embedder(t[:, None]))


POLICY = make_policy(
    sampler={"steps": 2},
    N={"base": 2},
    modules={"mlp": {"weight": 1.0}},
    scores={"staleness": 1.0},
)


@pytest.mark.parametrize(
    ("name", "inner"),
    slow_but(
        [(name, "eager") for name in OFTEN],
        [(name, inner) for name in SPELLINGS for inner in ("eager", "aot_eager")]
        + [(name, "inductor") for name in OFTEN],
        "the others are like one of these",
    ),
)
def test_fresh_tokens_are_computed_and_stale_ones_kept(name: str, inner: str) -> None:
    torch.manual_seed(0)
    model = Model(SPELLINGS[name]).double()
    old, new = torch.randn(2, 2, TOKENS, WIDTH, dtype=torch.float64)
    first, second = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        compiled = toca_fx.compile(model, POLICY, inner=inner)
        with toca_fx.session(num_steps=2):
            before, after = compiled(old, first).clone(), compiled(new, second)
        torch.testing.assert_close(before, model(old, first))
        kept, computed = new + (before - old), model(new, second)
    fresh, stale = ((after - one).abs().amax(-1) < 1e-9 for one in (computed, kept))
    assert fresh.sum(1).tolist() == stale.sum(1).tolist() == [TOKENS // 2] * 2
    assert bool((fresh ^ stale).all())
