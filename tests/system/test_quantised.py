"""Quantised and distributed weights: the sites and the work of the plain model, its own numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
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
    """The MLP is reused as a whole: none of its tokens are chosen, and nothing of it is scored."""
    model = quantised(torchao_per_tensor)
    found = explained(model)
    (miss,) = found.skipped
    assert miss.kind == "mlp"
    assert "torchao.choose_qparams_affine" in miss.reason
    assert "one scale for all" in miss.reason
    assert [site.path for site in found.sites] == [site.path for site in plain().sites]
    (mlp,) = (site for site in found.sites if site.kind == "mlp")
    assert set(mlp.modes) == {"full", "reuse"}
    assert found.flops_done < plain().flops_done


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
        kept = (torch.ops.aten.detach.default, torch.ops.aten.t.default)
        return cls(result) if func in kept else result


OPAQUE = r"transformer_blocks\.0\.ff\.net\.2\.weight.*Opaque.*__tensor_flatten__"


def put(model: nn.Module, kind: Callable[[Tensor], Any]) -> None:
    """Give one layer a weight of this class."""
    linear = model.get_submodule("transformer_blocks.0.ff.net.2")
    linear.weight = nn.Parameter(kind(linear.weight.detach()), requires_grad=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", [toca_fx.compile, explained])
def test_an_unknown_class_is_refused_by_name(entry: Callable[[nn.Module], Any]) -> None:
    model = tiny()
    put(model, Opaque)
    with pytest.raises(UnsupportedModelError, match=OPAQUE):
        entry(model)


def test_an_unknown_class_that_comes_later_is_refused_as_well() -> None:
    model = tiny()
    twin = toca_fx.compile(model, policy(3), inner="eager")
    _, kinds = run(twin)
    put(model, Opaque)
    with pytest.raises(UnsupportedModelError, match=OPAQUE):
        run(twin)
    put(model, Tensor.clone)
    assert run(twin)[1] == kinds == {"full": 2, "partial": 2}


class Reading(Opaque):
    """It says what is in it, and decides by its numbers."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Reading:
        return Reading(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default and args[-1].inner.amax() > 1e9:
            raise AssertionError("too large")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Untraced(Reading):
    """It fails where its graph is made, and nowhere else."""

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Untraced:
        return Untraced(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if get_proxy_mode() is not None:
            raise NotImplementedError("no graph of it")
        return Opaque.__torch_dispatch__.__func__(cls, func, types, args, kwargs)  # type: ignore[attr-defined]


def activations(model: nn.Module) -> None:
    quanto: Any = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    with quanto.Calibration():
        uncached(model)


def frozen(model: nn.Module) -> None:
    activations(model)
    importlib.import_module("optimum.quanto").freeze(model)


def unfrozen(model: nn.Module) -> None:
    quanto: Any = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)


HANDS_ON = r"PixArt.*`.*attn1.to_out.0` \(QLinear\) hands on a .*ActivationQ.*weights alone"
UNTRACED: dict[str, tuple[Callable[[nn.Module], None], str, str]] = {
    "decides": (
        lambda model: put(model, Reading),
        r"PixArt.*`transformer_blocks.0.ff.net.2` \(Linear\).* its weight, .*Reading.*leave this",
        r"attention.py.*Reading does, as `transformer_blocks.0.ff.net.2`",
    ),
    "fails": (lambda model: put(model, Untraced), *[r"Untraced.*cannot be traced.*no graph"] * 2),
    "activations": (activations, HANDS_ON, r"qbytes.py"),
    "frozen": (frozen, HANDS_ON, r"qbytes.py.*WeightQBytesTensor does, as `pos_embed.proj`"),
    "unfrozen": (unfrozen, r"is given a WeightQBytesTensor.*freeze", r"qbytes.py"),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_what_cannot_be_traced_is_said_with_its_module(name: str) -> None:
    """And never in Dynamo's words."""
    change, by_compile, by_explain = UNTRACED[name]
    model = tiny()
    change(model)
    uncached(model)
    for said, entry in (
        (by_compile, lambda: run(toca_fx.compile(model, policy(3), inner="eager"))),
        (by_explain, lambda: explained(model)),
    ):
        with pytest.raises(UnsupportedModelError, match=said) as error:
            entry()
        assert not any(word in str(error.value) for word in ("Dynamo", "proxy", "Hint", "guard"))
