"""Positions that are given with the call, [batch, tokens, k], as in FLUX's own code: they go with
the tokens that are computed, and are no keys.
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

HEADS, WIDTH, TOKENS, TEXT = 2, 32, 12, 5
Turn = Callable[[Tensor, Tensor], Tensor]


def cosines(x: Tensor, ids: Tensor) -> Tensor:
    return x * torch.cos(ids[..., :1])[:, None]


def tables(ids: Tensor) -> Tensor:
    """FLUX's rotations for positions [B, N, 2]: [B, 1, N, D / 2, 2, 2]."""
    omega = 1.0 / 100 ** (torch.arange(4, dtype=ids.dtype, device=ids.device) / 4)
    angles = torch.cat(
        [torch.einsum("...n,d->...nd", ids[..., axis], omega) for axis in range(2)], dim=-1
    )
    matrices = [angles.cos(), -angles.sin(), angles.sin(), angles.cos()]
    return torch.stack(matrices, dim=-1).unflatten(-1, (2, 2)).unsqueeze(1)


def flux(x: Tensor, ids: Tensor) -> Tensor:
    pairs, table = x.reshape(*x.shape[:-1], -1, 1, 2), tables(ids)
    return (table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]).reshape(*x.shape)


def complex_numbers(x: Tensor, ids: Tensor) -> Tensor:
    angles = torch.outer(ids[..., 0].flatten(), torch.arange(8, dtype=ids.dtype)).unflatten(
        0, ids.shape[:2]
    )
    turned = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turned).flatten(-2)


def halves(x: Tensor, ids: Tensor) -> Tensor:
    angles = (ids[..., 1:] * torch.arange(16, dtype=ids.dtype))[:, None]
    left, right = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()


def added(x: Tensor, ids: Tensor) -> Tensor:
    return x + torch.sin(ids[..., :1] * torch.arange(16, dtype=ids.dtype))[:, None]


TURNS = [cosines, flux, complex_numbers, halves, added]


class Block(nn.Module):
    """Self-attention; queries, keys and values of one projection, or of three."""

    def __init__(self, turn: Turn, split: bool) -> None:
        super().__init__()
        self.turn, self.norm = turn, nn.LayerNorm(WIDTH)
        widths = [WIDTH] * 3 if split else [3 * WIDTH]
        self.projections = nn.ModuleList(nn.Linear(WIDTH, width) for width in widths)
        self.out = nn.Linear(WIDTH, WIDTH)

    def project(self, x: Tensor) -> list[Tensor]:
        x = self.norm(x)
        if len(self.projections) == 3:
            each = [layer(x) for layer in self.projections]
            return [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in each]
        (layer,) = self.projections
        return list(layer(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        q, k = 3 * self.turn(q, ids), self.turn(k, ids)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x + self.mix(*self.project(x), ids)


class Model(nn.Module):
    def __init__(self, turn: Turn, split: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(turn, split)])

    def forward(self, x: Tensor, ids: Tensor, t: Tensor) -> Tensor:
        return self.blocks[0](x + t[:, None, None], ids)


class DoubleBlock(nn.Module):
    """An image and a text with positions of both in one sequence."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.image, self.text = Block(turn, split=False), Block(turn, split=False)

    def forward(self, x: Tensor, text: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        both = zip(self.text.project(text), self.image.project(x), strict=True)
        mixed = self.image.mix(*(torch.cat(pair, dim=2) for pair in both), ids)
        return x + mixed[:, TEXT:], text + mixed[:, :TEXT]


class Joint(nn.Module):
    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DoubleBlock(turn) for _ in range(2))

    def forward(self, x: Tensor, ids: Tensor, text: Tensor, text_ids: Tensor, t: Tensor) -> Tensor:
        ids, x = torch.cat((text_ids, ids), dim=1), x + t[:, None, None]
        for block in self.blocks:
            x, text = block(x, text, ids)
        return x


def policy(share: float, kind: str = "self_attention") -> toca_fx.Policy:
    return make_policy(
        sampler={"steps": 2},
        N={"base": 2},
        R={"base": share},
        modules={kind: {"weight": 1.0}},
        scores={"staleness": 1.0},
    )


def positions(batch: int, count: int) -> Tensor:
    """Others for each sample."""
    ids = torch.stack([torch.arange(count) // 3, torch.arange(count) % 3], dim=-1)
    return ids + 2.0 * torch.arange(batch)[:, None, None]


def given(batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    ids = positions(batch, TOKENS).double()
    xs = torch.randn(2, batch, TOKENS, WIDTH, dtype=torch.float64)
    times = torch.linspace(1, 0, 2, dtype=torch.float64)
    return [(x, ids, t.expand(batch)) for x, t in zip(xs, times, strict=True)]


@pytest.mark.parametrize(
    ("turn", "split", "batch"),
    slow_but(
        [(turn, split, 2) for turn in TURNS for split in (False, True)],
        [(turn, split, batch) for turn in TURNS for split in (False, True) for batch in (1, 2)],
        "one size of batch is enough",
    ),
)
def test_keys_are_merged_with_their_own_positions(turn: Turn, split: bool, batch: int) -> None:
    """Fresh tokens look at the keys of fresh and of stale tokens, each turned by its position."""
    torch.manual_seed(0)
    model, (first, second) = Model(turn, split).double(), given(batch)
    with torch.no_grad():
        compiled = toca_fx.compile(model, policy(0.5), inner="eager")
        with toca_fx.session(num_steps=2):
            before, after = compiled(*first).clone(), compiled(*second).clone()
        old, new = (x + t[:, None, None] for x, _, t in (first, second))
        torch.testing.assert_close(before, model(*first))
        stale = ((after - new) - (before - old)).abs().amax(-1) < 1e-9
        assert stale.sum(1).tolist() == [TOKENS // 2] * batch
        (block,) = model.blocks
        query, keys = block.project(new), block.project(torch.where(stale[..., None], old, new))
        expected = new + block.mix(query[0], *keys[1:], first[1])
    torch.testing.assert_close(after[~stale], expected[~stale])


@pytest.mark.parametrize("turn", TURNS)
def test_of_a_joint_sequence(turn: Turn) -> None:
    """With all tokens fresh, partial steps are the model."""
    torch.manual_seed(0)
    model, ids = Joint(turn).double(), positions(2, TEXT).double() + 7
    text = torch.randn(2, TEXT, WIDTH, dtype=torch.float64)
    calls = [(x, of, text, ids, t) for x, of, t in given(2)]
    with torch.no_grad():
        compiled = toca_fx.compile(model, policy(0.0, "joint_attention"), inner="eager")
        with toca_fx.session(num_steps=2) as run:
            for call in calls:
                torch.testing.assert_close(compiled(*call), model(*call))
    assert [step.kind for step in run.report().steps] == ["full", "partial"]
