"""Attention and MLP are found however they are spelled, and compute their fresh tokens only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import analysis_of, capture, make_policy
from tests.spellings.attentions import ATTENTIONS, MIXES, Mix
from tests.spellings.mlps import FLOAT32, MLPS, LoRA
from tests.spellings.models import JOINS, MODELS, Model, make
from tests.spellings.sizes import STEPS

POLICY = make_policy(
    sampler={"steps": STEPS},
    modules={"self_attention": {"weight": 1.0}, "mlp": {"weight": 1.0}},
)

# Where fresh tokens are taken behind other operators than the stream: constants, operators that
# mix tokens or whose rules are not known, and images.
BEHIND = {
    "merged_baddbmm": "empty",
    "product_bias": "view",
    "sinks": "expand",
    "registered_bhnd": "attention_bhnd",
    "registered_bnhd": "attention_bnhd",
    "flex": "flex_attention",
    "flash_attention": "_flash_attn_forward",
    "xformers": "efficient_attention_forward_cutlass",
    "sage_heads_first": "sageattn",
    "sage_tokens_first": "sageattn",
    "conv2d": "flatten",
    "ChannelsFirst": "flatten",
    "ChannelsLast": "flatten",
}


def assert_found(
    model: nn.Module,
    steps: list[Tensor],
    blocks: tuple[str, ...] = MODELS[Model],
    inner: str = "",
    behind: str = "",
) -> None:
    """All sites are found, and take their fresh tokens from the stream, or ``behind`` operators."""
    captured, inputs = capture(model, steps[0])
    analysis = analysis_of(captured, inputs, POLICY)
    found = analysis.matches
    expected = [
        (kind, f"{block}.{name}", layer, 2 * layer)
        for layer, block in enumerate(blocks)
        for kind, name in (("self_attention", f"attention{inner}"), ("mlp", "mlp"))
    ]
    sites = [(site.kind, site.path, site.layer, site.influence) for site in found.sites]
    assert sites == expected, found.misses
    assert not found.misses
    assert len({site.block for site in found.sites}) == 1
    plan = analysis.plan(STEPS)
    reports = [one for cost in analysis.costs(plan).values() for one in cost.graph.reports]
    assert {gather.behind for report in reports for gather in report.gathers} == set(behind.split())
    assert analysis.flops(plan) < STEPS * analysis.uncached_flops


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__)
def test_attention_spelled_as(mix: Mix) -> None:
    assert_found(*make(mix=mix), behind=BEHIND.get(mix.__name__, ""))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_of(name: str) -> None:
    model, steps = make(attention=ATTENTIONS[name])
    inner = ".heads" if name.startswith("multihead") else ""
    assert_found(model, steps, inner=inner)


@pytest.mark.parametrize("name", MLPS)
def test_mlp_spelled_as(name: str) -> None:
    dtype = torch.float32 if name in FLOAT32 else torch.float64
    assert_found(*make(dtype, mlp=MLPS[name]), behind=BEHIND.get(name, ""))


@pytest.mark.parametrize("name", JOINS)
def test_residual_spelled_as(name: str) -> None:
    assert_found(*make(join=JOINS[name]))


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_blocks_of(kind: type[Model]) -> None:
    behind = BEHIND.get(kind.__name__, "")
    assert_found(*make(kind=kind), blocks=MODELS[kind], behind=behind)


def test_low_rank_projections_of_an_attention() -> None:
    assert_found(*make(linear=LoRA))
