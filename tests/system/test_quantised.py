"""Quantised and distributed weights: the sites and the work of the plain model, its own numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import toca_fx
from tests.helpers import make_policy
from tests.marks import slow_but
from toca_fx.describe.explanation import Explanation
from toca_fx.diagnostics import UnsupportedModelError
from tools.pipelines.ways.weights import SCHEMES, Quantise, add_lora, torchao_per_tensor

STEPS = 4
# A pipeline with quanto's is a row of docs/pipelines.md that is tested every day.
OFTEN = ("torchao int8 dynamic", "GGUF Q8", "bitsandbytes NF4")


def policy(interval: int) -> Any:
    return make_policy(sampler={"steps": STEPS}, N={"base": interval})


def tiny() -> nn.Module:
    """A PixArt whose linear layers fit all schemes: 64 channels."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        cross_attention_dim=64,
        sample_size=16,
        caption_channels=32,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def quantised(scheme: Quantise) -> nn.Module:
    """The tiny model; skips the test if the library is not installed."""
    model = tiny()
    try:
        scheme(model)
    except ImportError as error:
        pytest.skip(str(error))
    return model


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


def explained(model: nn.Module, interval: int = 3) -> Explanation:
    return toca_fx.explain(model, policy(interval), **next(calls()))


@cache
def plain() -> Explanation:
    return explained(tiny())


def checked(model: nn.Module, partial: int = 2) -> None:
    """Full steps are those of ``model``, bit by bit where nothing is scored; others are cached."""
    expected = uncached(model)
    outputs, kinds = run(toca_fx.compile(model, policy(1), inner="eager"))
    assert kinds == {"full": STEPS}
    for output, right in zip(outputs, expected, strict=True):
        assert type(output) is Tensor
        assert torch.equal(output, right)
    outputs, kinds = run(toca_fx.compile(model, policy(3), inner="eager"))
    assert kinds == {"full": STEPS - partial, "partial": partial}
    # Where attention is scored it is rounded otherwise, and a few bits may be others for that.
    errors = [
        float((own - right).abs().mean()) for own, right in zip(outputs, expected, strict=True)
    ]
    assert max(errors[0], errors[3]) < 5e-3
    assert min(errors[1], errors[2]) > 2e-2


@pytest.mark.parametrize("scheme", slow_but(OFTEN, SCHEMES, "another scheme of the same kind"))
def test_a_quantised_model_is_cached_as_the_plain_one(scheme: str) -> None:
    model = quantised(SCHEMES[scheme])
    found = explained(model)
    assert [(site.path, site.kind, site.modes, site.influence) for site in found.sites] == [
        (site.path, site.kind, site.modes, site.influence) for site in plain().sites
    ]
    assert not found.skipped
    assert found.flops_uncached == plain().flops_uncached
    assert found.flops_done == pytest.approx(plain().flops_done, rel=0.01)
    checked(model)


@pytest.mark.parametrize(
    "scheme",
    slow_but(("torchao int8",), ("torchao int8", "quanto int8", "bitsandbytes NF4"), "the same"),
)
def test_lora_on_quantised_weights(scheme: str) -> None:
    pytest.importorskip("peft")
    model = quantised(SCHEMES[scheme])
    add_lora(model)
    assert len(explained(model).sites) == len(plain().sites)
    checked(model)


def test_one_scale_for_all_tokens_is_a_near_miss() -> None:
    """The MLP is computed as a whole, or on steps that run no block not at all."""
    model = quantised(torchao_per_tensor)
    (miss,) = explained(model).skipped
    assert miss.kind == "mlp"
    assert "torchao.choose_qparams_affine" in miss.reason
    assert "one scale for all" in miss.reason


@pytest.mark.slow(reason="the kind is tested every day with a scale for each token")
def test_one_scale_for_all_tokens_is_right() -> None:
    model = quantised(torchao_per_tensor)
    checked(model)


def test_models_are_told_apart_by_what_is_in_their_weights() -> None:
    """They share all parameters but the quantised ones, and take turns."""
    first = tiny()
    second = tiny()
    for model, scale in ((first, 1.0), (second, 2.0)):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.weight.data *= scale
        SCHEMES["torchao int8"](model)
    for path, parameter in first.named_parameters():
        if type(parameter) is nn.Parameter:
            owner, _, name = path.rpartition(".")
            setattr(second.get_submodule(owner), name, parameter)
    expected = [uncached(model) for model in (first, second)]
    twins = [toca_fx.compile(model, policy(1), inner="eager") for model in (first, second)]
    for twin, right in zip(twins, expected, strict=True):
        outputs, _ = run(twin)
        assert all(map(torch.equal, outputs, right))


class Opaque(Tensor):
    """A tensor in another one, which does not say so."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Opaque:
        made: Opaque = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda value: value.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return cls(result) if func is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("entry", [toca_fx.compile, explained])
def test_an_unknown_class_is_refused_by_name(entry: Callable[[nn.Module], Any]) -> None:
    model = tiny()
    linear = model.get_submodule("transformer_blocks.0.ff.net.2")
    linear.weight = nn.Parameter(Opaque(linear.weight.detach()), requires_grad=False)  # type: ignore[arg-type]
    said = r"transformer_blocks\.0\.ff\.net\.2\.weight.*Opaque.*__tensor_flatten__"
    with pytest.raises(UnsupportedModelError, match=said):
        entry(model)
