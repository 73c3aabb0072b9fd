"""Checks that a model makes of its values (``torch._assert_async``) stay, where they cost nothing:
no step computes a module again only to check it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import analysis_of, capture, make_policy
from toca_fx.lower.analysis import Analysis


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        torch._assert_async(y.isfinite().all(), "y")
        return x + self.down(nn.functional.gelu(y))


class Model(nn.Module):
    """Tokens [B, N, 8], a text [B, M, 8] and a timestep [B], each of which is checked."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.blocks = nn.Linear(8, 8), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        torch._assert_async(x.isfinite().all(), "x")
        torch._assert_async((text.abs() < 100).all(), "text")
        read = self.text(text)
        torch._assert_async((read < 1e9).all(), "read")
        x = x + read.mean(1, keepdim=True) + t[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x


POLICY = make_policy(sampler={"steps": 3}, N={"base": 3}, R={"base": 1.0}, modules={"mlp": "reuse"})


def given() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 6, 8), torch.randn(2, 3, 8), torch.rand(2)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analysis_of(*capture(Model(), *given()), POLICY)


def checked(module: Any) -> list[str]:
    return [
        node.args[1]
        for node in module.graph.nodes
        if node.target is torch.ops.aten._assert_async.msg
    ]


def test_each_is_made_where_its_values_are(analysis: Analysis) -> None:
    plan = analysis.plan(None)
    full, reused = (analysis.step_graph(plan, plan.steps[at].modes).module for at in (0, 1))
    assert checked(full) == ["x", "text", "y", "y"]
    assert checked(reused) == ["x", "text"]
    assert checked(analysis.conditions.module) == ["text", "read"]


def test_a_call_that_fails_it_fails() -> None:
    model = Model().eval()
    with torch.no_grad():
        compiled = toca_fx.compile(model, POLICY, inner="eager")
        x, text, t = given()
        with toca_fx.session(num_steps=3):
            compiled(x, text, t)
            with pytest.raises(RuntimeError, match="x"):
                compiled(x / 0, text, t)


def test_it_is_explained() -> None:
    found = toca_fx.explain(Model(), POLICY, *given())
    assert [site.path for site in found.sites] == ["blocks.0", "blocks.1"]
