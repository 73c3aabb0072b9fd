"""Caches in another dtype than the model's: smaller by as much as it is, exact on full steps,
rounded on partial ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import toca_fx
from tests.helpers import analysis_of, capture, make_policy
from tests.marks import slow_but
from toca_fx.examples import build, examples, prediction, vary
from toca_fx.runtime.report import Report

STEPS = 6

EVERYTHING_PARTIAL = {
    kind: {"weight": 1.0}
    for kind in ("self_attention", "cross_attention", "joint_attention", "mlp")
}

# Relative rounding of one value.
ROUNDING = {
    "float32": 1e-7,
    "bfloat16": 2**-8,
    "float16": 2**-11,
    "float8_e4m3fn": 2**-4,
    "float8_e5m2": 2**-3,
}


def run(name: str, *, inner: str = "eager", **sections: Any) -> tuple[list[Tensor], Report]:
    example = examples()[name]
    model, first = build(example, dtype=torch.float64)
    # Random scores do not depend on what is rounded, so that all runs choose the same tokens.
    policy = make_policy(sampler={"steps": STEPS}, scores={"random": 1.0}, **sections)
    torch._dynamo.reset()
    fast = toca_fx.compile(model, policy, inner=inner)
    with torch.no_grad(), toca_fx.session(STEPS) as session:
        outputs = [
            prediction(fast(**vary(example, first, step, STEPS)))[0].clone()
            for step in range(STEPS)
        ]
    return outputs, session.report()


@pytest.mark.parametrize(
    "modules",
    slow_but([EVERYTHING_PARTIAL], [{}, EVERYTHING_PARTIAL], "all partial holds the MLP too"),
    ids=["mlp partial", "all partial"],
)
@pytest.mark.parametrize(
    "name",
    slow_but(
        ["PixArtTransformer2DModel"],
        ["PixArtTransformer2DModel", "FluxTransformer2DModel"],
        "one class is enough",
    ),
)
def test_partial_steps_are_rounded_and_full_ones_are_not(
    name: str, modules: dict[str, Any]
) -> None:
    exact, plain = run(name, modules=modules)
    dtypes = (
        ROUNDING
        if name == "FluxTransformer2DModel" and not modules
        else ("bfloat16", "float8_e4m3fn")
    )
    for dtype in dtypes:
        rounded, report = run(name, modules=modules, cache={"dtype": dtype})
        assert [step.kind for step in report.steps] == ["full", "partial", "partial"] * 2
        for step, ours, theirs in zip(report.steps, rounded, exact, strict=True):
            error = float((ours - theirs).norm() / theirs.norm())
            assert error == 0 if step.kind == "full" else 0 < error < 2 * ROUNDING[dtype], (
                dtype,
                step.index,
            )
        assert report.cache_bytes < plain.cache_bytes


def test_the_bytes_are_predicted_and_shrink_with_the_dtype() -> None:
    example = examples()["DiTTransformer2DModel"]
    model, inputs = build(example, dtype=torch.float64)
    captured, flat = capture(model, **inputs)
    sizes = {}
    for dtype in ("model", "bfloat16", "float8_e4m3fn"):
        found = analysis_of(
            captured,
            flat,
            make_policy(sampler={"steps": STEPS}, scores={"random": 1.0}, cache={"dtype": dtype}),
        )
        plan = found.plan(None)
        sizes[dtype] = found.nbytes(plan)
        assert run("DiTTransformer2DModel", cache={"dtype": dtype})[1].cache_bytes == sizes[dtype]
        features = sum(
            batch * tokens * channels
            for batch, tokens, channels in (site.shape for site in plan.sites)
        )
    assert sizes["model"] - sizes["bfloat16"] == features * (8 - 2)
    assert sizes["bfloat16"] - sizes["float8_e4m3fn"] == features


@pytest.mark.slow(reason="inductor with memories of other dtypes")
def test_inductor_keeps_to_it() -> None:
    for dtype in ("bfloat16", "float8_e4m3fn"):
        (ours, report), (theirs, _) = (
            run("DiTTransformer2DModel", inner=inner, cache={"dtype": dtype})
            for inner in ("inductor", "eager")
        )
        for a, b, step in zip(ours, theirs, report.steps, strict=True):
            # The same value may be rounded up here and down there.
            assert (a - b).norm() <= (1e-5 if step.kind == "full" else ROUNDING[dtype]) * b.norm()
