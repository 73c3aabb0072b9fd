"""Every transformer of diffusers: what is matched in it, and that it runs uncached, wholly reused
and token by token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import capture_calls, make_policy
from toca_fx.capture import aten as trace
from toca_fx.capture.aten import to_aten
from toca_fx.describe.coverage import coverage
from toca_fx.examples import build, examples, prediction, vary
from toca_fx.lower.compiler import Inner
from toca_fx.lower.program import Program
from toca_fx.policy import Policy
from toca_fx.runtime.session import ModelKey, Session
from tools.coverage_table import PARTLY, REFUSED, SUPPORTED_SHARE

STEPS = 3

NEVER = make_policy(sampler={"steps": STEPS}, N={"base": 1})

FORA = make_policy(
    sampler={"steps": STEPS}, N={"base": 3}, R={"base": 1.0}, modules={"mlp": "reuse"}
)

TOKENWISE = make_policy(sampler={"steps": STEPS}, N={"base": 3}, R={"base": 0.5})


def _generation(program: Program, steps: list[list[Any]]) -> list[Tensor]:
    run, key = Session(STEPS), ModelKey()
    with torch.no_grad():
        return [run.call(key, program, inputs, None)[0].clone() for inputs in steps]


@pytest.mark.parametrize("name", [name for name in examples() if name not in REFUSED])
def test_a_transformer_of_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = examples()[name]
    model, first = build(example)
    calls = [vary(example, first, step, STEPS) for step in range(STEPS)]
    with torch.no_grad():
        expected = [prediction(model(**call))[0] for call in calls]
    captured, steps = capture_calls(model, calls)
    # One trace for all policies: no program may change it.
    module = to_aten(captured, steps[0])
    monkeypatch.setattr(trace, "to_aten", lambda *_: module)

    def program(policy: Policy) -> Program:
        return Program(captured, steps[0], policy, Inner("eager"))

    never = program(NEVER)
    assert (coverage(never.aten, never.matches).share >= SUPPORTED_SHARE) == (name not in PARTLY)
    results = {}
    for policy, cached in ((NEVER, never), (FORA, program(FORA)), (TOKENWISE, program(TOKENWISE))):
        results[id(policy)] = outputs = _generation(cached, steps)
        assert all(output.isfinite().all() for output in outputs)
        torch.testing.assert_close(outputs[0], expected[0], rtol=1e-3, atol=1e-4)
    for output, right in zip(results[id(NEVER)], expected, strict=True):
        torch.testing.assert_close(output, right, rtol=1e-4, atol=1e-5)
    kinds = {site.kind for site in never.matches.sites}
    assert "mlp" in kinds or name in PARTLY
    reused, fresh = results[id(FORA)][1], results[id(TOKENWISE)][1]
    assert torch.equal(reused, fresh) == ("mlp" not in kinds), (
        "R changes the result, where tokens are chosen"
    )
    assert torch.allclose(reused, expected[1], rtol=1e-4, atol=1e-5) == (not kinds), (
        "caching changes the result"
    )
