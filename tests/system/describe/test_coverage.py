"""Every transformer of diffusers: what is matched in it, and that it runs uncached, wholly reused
and token by token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import capture_calls, make_policy
from tests.marks import slow_but
from toca_fx.capture.aten import to_aten
from toca_fx.describe.coverage import coverage
from toca_fx.examples import build, examples, prediction, vary
from toca_fx.graph import roles
from toca_fx.lower.analysis import Analysis
from toca_fx.lower.compiler import Inner
from toca_fx.lower.program import Program
from toca_fx.match.matcher import match
from toca_fx.plan.planner import Planner
from toca_fx.policy import Policy
from toca_fx.runtime.models import ModelKey
from toca_fx.runtime.parts import Attempt
from toca_fx.runtime.runner import Runner
from toca_fx.runtime.session import Session
from tools.coverage_table import PARTLY, REFUSED, SUPPORTED_SHARE

STEPS = 3

NEVER = make_policy(sampler={"steps": STEPS}, N={"base": 1})

FORA = make_policy(
    sampler={"steps": STEPS}, N={"base": 3}, R={"base": 1.0}, modules={"mlp": "reuse"}
)

FORECAST = {"basis": "newton", "order": 1}

SKIPS = {
    grain: make_policy(
        sampler={"steps": STEPS}, N={"base": 3}, cache={"grain": grain}, forecast=FORECAST
    )
    for grain in ("model", "output")
}

TOKENWISE = make_policy(sampler={"steps": STEPS}, N={"base": 3}, R={"base": 0.5})


def _generation(analysis: Analysis, steps: list[list[Any]]) -> list[Tensor]:
    runner = Runner(Program(analysis, Inner("eager")), steps[0])
    run, key = Session(STEPS), ModelKey()
    with torch.no_grad():
        return [run.call(key, runner, inputs, Attempt())[0].clone() for inputs in steps]


# An image, a video and a sound.
EVERY_DAY = ("SD3Transformer2DModel", "WanTransformer3DModel", "StableAudioDiTModel")


@pytest.mark.parametrize(
    "name",
    slow_but(
        EVERY_DAY,
        [name for name in examples() if name not in REFUSED],
        "one class of each family is enough",
    ),
)
def test_a_transformer_of_diffusers(name: str) -> None:
    example = examples()[name]
    model, first = build(example)
    calls = [vary(example, first, step, STEPS) for step in range(STEPS)]
    with torch.no_grad():
        expected = [prediction(model(**call))[0] for call in calls]
    captured, steps = capture_calls(model, calls)
    # One trace for all policies: no program may change it.
    module = to_aten(captured, steps[0])

    def analysis(policy: Policy) -> Analysis:
        planner = Planner(policy, match(module.graph), roles.aspect(module.graph))
        return Analysis(module, planner)

    never = analysis(NEVER)
    assert (coverage(never.aten, never.matches).share >= SUPPORTED_SHARE) == (name not in PARTLY)
    results = {}
    for policy, cached in (
        (NEVER, never),
        (FORA, analysis(FORA)),
        (TOKENWISE, analysis(TOKENWISE)),
    ):
        results[id(policy)] = outputs = _generation(cached, steps)
        assert all(output.isfinite().all() for output in outputs)
        torch.testing.assert_close(outputs[0], expected[0], rtol=1e-3, atol=1e-4)
    for output, right in zip(results[id(NEVER)], expected, strict=True):
        torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-5)
    for grain, policy in SKIPS.items():
        skipping = analysis(policy)
        outputs = _generation(skipping, steps)
        torch.testing.assert_close(outputs[0], expected[0], rtol=1e-3, atol=1e-4)
        assert all(output.isfinite().all() for output in outputs)
        assert torch.equal(outputs[1], outputs[0]) or grain == "model"
        plan = skipping.plan(None)
        assert [step.kind for step in plan.steps] == ["full", "skip", "skip"]
        assert skipping.step_flops(plan, plan.steps[1]) < skipping.uncached_flops / 2
    assert not never.matches.uncut
    kinds = {site.kind for site in never.matches.sites}
    assert "mlp" in kinds or name in PARTLY
    reused, fresh = results[id(FORA)][1], results[id(TOKENWISE)][1]
    assert torch.equal(reused, fresh) == ("mlp" not in kinds), (
        "R changes the result, where tokens are chosen"
    )
    assert torch.allclose(reused, expected[1], rtol=1e-4, atol=1e-5) == (not kinds), (
        "caching changes the result"
    )
