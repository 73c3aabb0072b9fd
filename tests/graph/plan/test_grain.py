"""Modules that are always reused together share one cache, of what they add to the stream
(cache.grain: block).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import (
    analysis_of,
    capture,
    capture_tiny,
    make_policy,
)
from toca_fx.graph.ops import aten
from toca_fx.match.matcher import match
from toca_fx.match.sites import Matches
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import Plan
from toca_fx.plan.planner import make_plan

REUSED = {"modules": {"mlp": "reuse"}, "scores": {"staleness": 1.0}}

TOGETHER = {**REUSED, "cache": {"grain": "block"}}


def plan_of(kind: str, **sections: Any) -> Plan:
    source, _ = capture_tiny(kind, layers=2)
    return make_plan(match(source.graph), make_policy(**sections))


def test_all_modules_of_a_block_share_the_cache_of_the_first() -> None:
    plan = plan_of("original", **TOGETHER)
    assert plan.runs == ((0, 1), (2, 3))
    assert plan.kept == (Buffer("cache", 0), Buffer("cache", 2))
    assert not plan.warnings


def test_only_what_is_reused_on_the_same_steps_shares() -> None:
    assert plan_of("original", **REUSED).runs == ()
    assert plan_of(
        "original", **TOGETHER, rules=[{"match": "mlp", "layers": 0, "N": {"base": 6}}]
    ).runs == ((2, 3),)
    assert plan_of(
        "original", **TOGETHER, rules=[{"match": "mlp", "layers": 1, "cache": {"grain": "module"}}]
    ).runs == ((0, 1),)
    assert plan_of(
        "original",
        **TOGETHER,
        rules=[{"match": "mlp", "layers": 1, "cache": {"dtype": "bfloat16"}}],
    ).runs == ((0, 1),)
    partial = plan_of("original", cache={"grain": "block"})
    assert partial.runs == ()
    assert [warning for warning in partial.warnings if "grain" in warning]


def test_no_cache_is_shared_where_another_site_joins_the_same_add() -> None:
    """The add would be replaced, and with it what the other site computes."""
    source, _ = capture_tiny("original", layers=1)
    first, second = match(source.graph).sites
    sites = (
        first,
        second,
        replace(second, path="blocks.0.other", output=first.output, follows=None),
    )
    assert make_plan(Matches(sites, ()), make_policy(**TOGETHER)).runs == ()
    assert make_plan(Matches(sites[:2], ()), make_policy(**TOGETHER)).runs == ((0, 1),)


def test_a_branch_that_is_no_site_is_never_cached() -> None:
    """Work that joins the stream together with a site's, and is none itself, is done on every
    step.
    """

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = (
                nn.LayerNorm(32),
                nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
            )
            self.norm2, self.mlp2 = (
                nn.LayerNorm(32),
                nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
            )
            self.extra = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mlp(self.norm(x))
            return x + (self.mlp2(self.norm2(x)) + self.extra(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(1, 16, 32, dtype=torch.float64)
    captured, flat = capture(model, x, torch.tensor([1.0]))
    found = analysis_of(captured, flat, make_policy(**TOGETHER))
    assert [site.kind for site in found.matches.sites] == ["mlp", "mlp"]
    assert [site.follows for site in found.matches.sites] == [None, None]


def test_a_state_that_something_else_reads_is_computed() -> None:
    """A site follows another only if nothing but itself reads the stream between them."""
    source, _ = capture_tiny("original", layers=1)
    assert [site.follows for site in match(source.graph).sites] == [None, 0]
    between = next(
        node for node in source.graph.nodes if node.name == match(source.graph).sites[1].stream
    )
    end = next(iter(source.graph.find_nodes(op="output")))
    with source.graph.inserting_before(end):
        end.args = ((*end.args[0], source.graph.call_function(aten.relu.default, (between,))),)
    assert [site.follows for site in match(source.graph).sites] == [None, None]


def test_a_site_that_follows_nothing_has_its_own() -> None:
    source, _ = capture_tiny("original", layers=1)
    sites = tuple(replace(site, follows=None) for site in match(source.graph).sites)
    assert make_plan(Matches(sites, ()), make_policy(**TOGETHER)).runs == ()
