"""Quantised and distributed weights: the sites and the work of the plain model, its own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import make_policy
from tests.marks import slow_but
from tests.system.quantised import SCHEMES, torchao_per_tensor
from toca_fx.describe.explanation import Explanation
from toca_fx.diagnostics import UnsupportedModelError

STEPS = 6
OFTEN = ("torchao int8", "torchao int8 dynamic", "quanto int8", "GGUF Q8", "bitsandbytes NF4")


def policy(interval: int) -> Any:
    return make_policy(sampler={"steps": STEPS}, N={"base": interval})


def tiny(layers: int = 2) -> nn.Module:
    """A PixArt whose linear layers fit all schemes: 64 channels."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=layers,
        cross_attention_dim=64,
        sample_size=16,
        caption_channels=32,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def calls() -> Iterator[dict[str, Any]]:
    """The calls of one generation; the caption is one tensor."""
    generator = torch.Generator().manual_seed(1)
    caption = torch.randn(2, 12, 32, generator=generator)
    for t in torch.linspace(999, 0, STEPS).round().long():
        yield {
            "hidden_states": torch.randn(2, 4, 16, 16, generator=generator),
            "timestep": t.expand(2),
            "encoder_hidden_states": caption,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }


def run(model: nn.Module) -> tuple[list[Tensor], dict[str, int]]:
    with torch.no_grad(), toca_fx.session(num_steps=STEPS) as session:
        outputs = [model(**call)[0] for call in calls()]
    return outputs, dict(session.report().kinds)


def uncached(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [model(**call)[0] for call in calls()]


def explained(model: nn.Module) -> Explanation:
    return toca_fx.explain(model, policy(3), **next(calls()))


@pytest.mark.parametrize("scheme", slow_but(OFTEN, SCHEMES, "another scheme of the same kind"))
def test_what_is_computed_is_what_the_model_computes(scheme: str) -> None:
    model = tiny()
    plain = explained(model)
    SCHEMES[scheme](model)
    found = explained(model)
    assert [(site.path, site.kind, site.modes, site.influence) for site in found.sites] == [
        (site.path, site.kind, site.modes, site.influence) for site in plain.sites
    ]
    assert not found.skipped
    assert found.flops_uncached == plain.flops_uncached
    assert found.flops_done == pytest.approx(plain.flops_done, rel=0.01)
    expected = uncached(model)
    outputs, kinds = run(toca_fx.compile(model, policy(1), inner="eager"))
    assert kinds == {"full": STEPS}
    for output, right in zip(outputs, expected, strict=True):
        assert type(output) is Tensor
        assert torch.equal(output, right)
    outputs, kinds = run(toca_fx.compile(model, policy(3), inner="eager"))
    assert kinds == {"full": 2, "partial": 4}
    assert torch.equal(outputs[0], expected[0])
    assert torch.equal(outputs[3], expected[3])
    assert all(output.isfinite().all() for output in outputs)
