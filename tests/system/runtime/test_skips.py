"""Whole generations with steps that run no block: what is prepared for them, what is compiled, and
what their histories may be kept in.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import toca_fx
from tests.helpers import explain_tiny, make_inputs, make_policy, run_all, tiny
from tests.marks import slow_but
from toca_fx.examples import build, examples, prediction, vary
from toca_fx.plan.forecast import amplification, weights
from toca_fx.policy import Forecast, Policy
from toca_fx.runtime.report import Report

STEPS = 8
ORDER_2 = {"basis": "newton", "order": 2}
KINDS = ["full", "full", "full", "skip", "skip", "full", "skip", "full"]
GRAINS = ("model", "output")
REUSED: dict[str, Any] = {"modules": {"mlp": "reuse"}, "scores": {"staleness": 1.0}}


def policy_of(grain: str, *, order: int = 2, hoisting: int = 64, **cache: str) -> Policy:
    return make_policy(
        sampler={"steps": STEPS},
        N={"base": 3, "first": 3, "last": 1},
        **REUSED,
        cache={"grain": grain, **cache},
        forecast={"basis": "newton", "order": order},
        hoisting={"memory": hoisting},
    )


def calls_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Any]]:
    example = examples()[name]
    model, first = build(example, dtype=dtype)
    return model, [vary(example, first, step, STEPS) for step in range(STEPS)]


def generation(
    fast: nn.Module, calls: Sequence[dict[str, Any]], listed: bool = False
) -> tuple[list[Tensor], Report]:
    timesteps = [float(call["timestep"].flatten()[0]) for call in calls] if listed else None
    with torch.no_grad(), toca_fx.session(None if listed else STEPS, timesteps=timesteps) as run:
        outputs = [prediction(fast(**call))[0].clone() for call in calls]
    return outputs, run.report()


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


CLASSES = ("PixArtTransformer2DModel", "DiTTransformer2DModel", "FluxTransformer2DModel")


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", slow_but(CLASSES[:1], CLASSES, "one class is enough"))
def test_skips_prepare_what_they_read(name: str, grain: str) -> None:
    model, calls = calls_of(name)
    torch._dynamo.reset()
    off, plain = generation(
        toca_fx.compile(model, policy_of(grain, hoisting=0), inner="eager"), calls
    )
    fast = toca_fx.compile(model, policy_of(grain), inner="eager")
    on, report = generation(fast, calls)
    ahead, at_once = generation(fast, calls, listed=True)
    assert close(on, off)
    assert close(ahead, off)
    assert [step.kind for step in report.steps] == KINDS
    of_skips = {step.beside_flops for step in report.steps if step.kind == "skip"}
    of_full = {step.beside_flops for step in report.steps[1:] if step.kind == "full"}
    assert len(of_full) == 1
    if grain == "output":
        assert of_skips == {0}
    else:
        assert 0 < max(of_skips) < max(of_full)
    assert [step.beside_flops for step in at_once.steps[1:]] == [0] * (STEPS - 1)
    assert not at_once.warnings
    assert report.flops_done <= plain.flops_done


@pytest.mark.parametrize("grain", GRAINS)
def test_a_caption_that_is_made_anew_is_left_to_full_steps(grain: str) -> None:
    model, calls = calls_of("PixArtTransformer2DModel")
    name = "encoder_hidden_states"
    remade = [{**call, name: call[name].clone()} for call in calls]
    torch._dynamo.reset()
    off, _ = generation(toca_fx.compile(model, policy_of(grain, hoisting=0), inner="eager"), remade)
    on, report = generation(toca_fx.compile(model, policy_of(grain), inner="eager"), remade)
    assert close(on, off)
    spent = [step.beside_flops for step in report.steps]
    assert len({flops for flops, kind in zip(spent, KINDS, strict=True) if kind == "full"}) == 1
    assert (
        max(flops for flops, kind in zip(spent, KINDS, strict=True) if kind == "skip")
        < spent[0] / 4
    )


@pytest.mark.parametrize("grain", ["module", "block", *GRAINS])
def test_a_second_generation_compiles_nothing(grain: str) -> None:
    compiled: list[fx.GraphModule] = []

    def inner(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    torch._dynamo.reset()
    policy = make_policy(**REUSED, cache={"grain": grain}, forecast=ORDER_2)
    fast = toca_fx.compile(tiny("diffusers"), policy, inner=inner)
    reports = []
    for seed in (0, 1):
        with toca_fx.session() as run:
            run_all(fast, make_inputs(seed=seed))
        reports.append(run.report())
        if seed == 0:
            first = len(compiled)
    assert len(compiled) == first
    assert [report.compiled_graphs for report in reports] == [2, 2]


@pytest.mark.parametrize(
    "sections",
    [
        {"cache": {"grain": "model"}},
        {"cache": {"grain": "output", "dtype": "bfloat16"}},
        {"skip": "alternate", "N": {"base": 4}},
        {"modules": {"mlp": "reuse"}, "cache": {"grain": "block"}},
    ],
)
def test_a_report_says_what_was_explained(sections: dict[str, Any]) -> None:
    policy = make_policy(**sections, forecast=ORDER_2)
    told = explain_tiny("original", policy)
    torch._dynamo.reset()
    with toca_fx.session() as run:
        run_all(toca_fx.compile(tiny("original"), policy, inner="eager"), make_inputs())
    report = run.report()
    assert (told.flops_done, told.flops_uncached) == (report.flops_done, report.flops_uncached)
    assert told.cache_bytes == report.cache_bytes > 0
    assert told.steps == tuple((step.index, step.kind) for step in report.steps)
    assert {each.kind: each.count for each in told.kinds} == report.kinds
    assert [(s.path, s.kind, s.tokens, s.computed) for s in told.sites] == [
        (s.path, s.kind, s.tokens, s.computed) for s in report.sites
    ]
    whole = [site for site in told.sites if not site.path]
    assert all(f"{site.kind:<18}     1" in str(report) for site in whole)


class Convolutions(nn.Module):
    """Blocks without attention and MLP: no site."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.embed = nn.Linear(1, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x * self.embed(t[:, None])[:, :, None, None]
        for block in self.blocks:
            x = x + block(x).relu()
        return x


@pytest.mark.parametrize(
    ("grain", "skips", "warned"), [("output", 4, False), ("model", 4, True), ("module", 0, True)]
)
def test_a_model_without_any_site(
    grain: str, skips: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    policy = make_policy(sampler={"steps": 6}, N={"base": 3}, cache={"grain": grain})
    fast = toca_fx.compile(Convolutions(), policy, inner="eager")
    with torch.no_grad(), toca_fx.session(6) as run:
        outputs = [fast(x, t / 1000) for x, t, _ in make_inputs(6)]
    assert run.report().kinds.get("skip", 0) == skips
    assert [torch.equal(outputs[0], other) for other in outputs[1:3]] == [skips > 0] * 2
    assert not torch.equal(outputs[0], outputs[3])
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(warnings) == warned


# What histories are kept in

ROUNDING = {"bfloat16": 2**-8, "float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}


@pytest.mark.parametrize(
    ("kept", "computed"),
    slow_but(
        [*((kept, torch.float32) for kept in ROUNDING), ("bfloat16", torch.float64)],
        itertools.product(ROUNDING, (torch.float32, torch.float64)),
        "in double precision one dtype is enough",
    ),
)
def test_histories_of_few_bits_are_summed_in_many(kept: str, computed: torch.dtype) -> None:
    """A forecast is as exact as the values kept: each is rounded once, and the sum is not."""
    model, calls = calls_of("DiTTransformer2DModel", computed)
    outputs = {}
    for dtype in ("model", kept):
        torch._dynamo.reset()
        policy = policy_of("output", dtype=dtype)
        outputs[dtype], _ = generation(toca_fx.compile(model, policy, inner="eager"), calls)
    rule, full = (
        Forecast("newton", order=2),
        [at for at, kind in enumerate(KINDS) if kind == "full"],
    )
    for at, kind in enumerate(KINDS):
        exact, rounded = outputs["model"][at], outputs[kept][at]
        if kind == "full":
            assert torch.equal(exact, rounded)
            continue
        times = [call for call in full if call < at][-3:]
        found = weights(rule, tuple(map(float, times)), float(at))
        assert amplification(found) > 1
        values = [outputs["model"][call].to(getattr(torch, kept)) for call in reversed(times)]
        by_hand = sum(
            weight * value.to(computed) for weight, value in zip(found, values, strict=True)
        )
        assert torch.allclose(rounded, by_hand, rtol=1e-5, atol=1e-5 * exact.abs().max())
        error = (rounded - exact).abs().max() / max(value.float().abs().max() for value in values)
        assert 0 < error <= amplification(found) * ROUNDING[kept]


@pytest.mark.parametrize(
    ("dtype", "grain"),
    slow_but(
        [("bfloat16", "model")],
        itertools.product(("model", "bfloat16", "float8_e4m3fn"), ("module", *GRAINS)),
        "one dtype and one grain: the sum is the same code",
    ),
)
def test_inductor_sums_alike(dtype: str, grain: str) -> None:
    """On a model in half precision: sums are in float32, whoever compiles them."""
    model, calls = calls_of("DiTTransformer2DModel", torch.bfloat16)
    outputs = []
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        policy = policy_of(grain, order=1, dtype=dtype)
        found, report = generation(toca_fx.compile(model, policy, inner=inner), calls)
        assert report.compiled_graphs == 2
        outputs.append(found)
    # What is computed a little differently may be rounded up here and down there.
    most = 0.1 if dtype == "float8_e4m3fn" else 0.03
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours - theirs).float().norm() <= most * theirs.float().norm()
