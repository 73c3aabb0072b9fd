"""Attention and MLP are found however they are spelled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import capture
from tests.spellings import ATTENTIONS, FLOAT32, JOINS, MIXES, MLPS, MODELS, LoRA, Mix, Model, make
from toca_fx.capture.aten import to_aten
from toca_fx.match.matcher import match


def assert_found(
    model: nn.Module,
    steps: list[Tensor],
    blocks: tuple[str, ...] = MODELS[Model],
    inner: str = "",
) -> None:
    captured, inputs = capture(model, steps[0])
    found = match(to_aten(captured, inputs).graph)
    expected = [
        (kind, f"{block}.{name}", layer, 2 * layer)
        for layer, block in enumerate(blocks)
        for kind, name in (("self_attention", f"attention{inner}"), ("mlp", "mlp"))
    ]
    sites = [(site.kind, site.path, site.layer, site.influence) for site in found.sites]
    assert sites == expected, found.misses
    assert not found.misses
    assert len({site.block for site in found.sites}) == 1


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__)
def test_attention_spelled_as(mix: Mix) -> None:
    assert_found(*make(mix=mix))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_of(name: str) -> None:
    model, steps = make(attention=ATTENTIONS[name])
    inner = ".heads" if name.startswith("multihead") else ""
    assert_found(model, steps, inner=inner)


@pytest.mark.parametrize("name", MLPS)
def test_mlp_spelled_as(name: str) -> None:
    dtype = torch.float32 if name in FLOAT32 else torch.float64
    assert_found(*make(dtype, mlp=MLPS[name]))


@pytest.mark.parametrize("name", JOINS)
def test_residual_spelled_as(name: str) -> None:
    assert_found(*make(join=JOINS[name]))


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_blocks_of(kind: type[Model]) -> None:
    assert_found(*make(kind=kind), blocks=MODELS[kind])


def test_low_rank_projections_of_an_attention() -> None:
    assert_found(*make(linear=LoRA))
