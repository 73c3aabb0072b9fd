"""The inner compilers: how often they are asked, and that they change nothing. The only file that
runs inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import compilation_time_metrics, counters

import toca_fx
from tests.helpers import make_inputs, make_policy, run_all, tiny
from tests.marks import slow_but
from toca_fx.examples import build, examples, prediction, vary
from toca_fx.policy import Policy

STEPS = 50
# Of the largest output: sinusoids of timesteps near 1000 lose three digits in single precision
TOLERANCE = 1e-4


class Counting:
    """A named backend that keeps count of its graphs."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.count += 1
        return lookup_backend(self.name)(graph, inputs)


def pinned(**sections: Any) -> Policy:
    """Random scores do not depend on activations, so every inner backend gets the same tokens; K
    rises from 0 by 1 or 2.
    """
    ratio = {"base": 0.5, "step_weight": -1.05}
    return make_policy(
        **{
            "sampler": {"steps": STEPS},
            "R": ratio,
            "scores": {"random": 1.0},
            "spatial": {"bonus": 0.5},
            **sections,
        }
    )


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def compilations() -> tuple[Any, ...]:
    """What Dynamo, AOTAutograd and inductor have counted so far."""
    return {name: dict(values) for name, values in counters.items()}, {
        name: len(times) for name, times in compilation_time_metrics.items()
    }


def test_a_ratio_schedule_compiles_one_graph_per_kind_of_step() -> None:
    model, policy = tiny("original", layers=2), pinned()
    inputs, other = make_inputs(STEPS), make_inputs(STEPS, seed=1)
    inner = Counting("inductor")
    fast = toca_fx.compile(model, policy, inner=inner)
    with toca_fx.session() as run:
        outputs = run_all(fast, inputs)
    report = run.report().to_dict()
    asked = inner.count
    assert report["compiled_graphs"] == 2
    computed = report["sites"][1]["computed"]
    assert {0, 1}.issubset(computed), "steps without a token and with one go through the same graph"
    assert len(set(computed)) > 20

    before = compilations()
    with toca_fx.session() as run:
        others = run_all(fast, other)
    assert inner.count == asked
    assert run.report().compiled_graphs == 2
    assert compilations() == before, "a second generation compiles nothing"

    eager = toca_fx.compile(model, policy, inner="eager")
    for given, found in ((inputs, outputs), (other, others)):
        with toca_fx.session():
            expected = run_all(eager, given)
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert close(a, b), f"call {number}"
    assert not all(close(a, b) for a, b in zip(outputs, run_all(model, inputs), strict=True))


@pytest.mark.slow(reason="inductor; the ratio schedule goes through these numbers of tokens too")
@pytest.mark.parametrize("kept", [1.0, 0.97, 0.0], ids=["no token", "one token", "all tokens"])
def test_a_constant_number_of_tokens(kept: float) -> None:
    policy = pinned(sampler={"steps": 6}, R={"base": kept, "layer_weight": -0.5, "layer_span": 2})
    model, inputs = tiny("original", layers=2), make_inputs(4)
    outputs = []
    for inner in ("inductor", "eager"):
        with toca_fx.session() as run:
            outputs.append(run_all(toca_fx.compile(model, policy, inner=inner), inputs))
    partial = [site.computed[1] for site in run.report().sites if site.kind == "mlp"]
    assert partial == {1.0: [0, 0], 0.97: [0, 1], 0.0: [32, 64]}[kept]
    assert all(close(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.slow(reason="inductor in another precision")
def test_no_token_and_one_token_in_bfloat16() -> None:
    """There the lowering of matmuls reasons about K = 1, so that what holds in float32 has to be
    shown again.

    Measured against eager in float32, because both backends round timesteps and features to 8 bits
    in places of their own.
    """
    model = tiny("original", layers=2)
    with toca_fx.session():
        expected = run_all(toca_fx.compile(model, pinned(), inner="eager"), make_inputs(6))
    plain = run_all(model, make_inputs(6))
    with toca_fx.session() as run:
        fast = toca_fx.compile(
            tiny("original", layers=2).to(torch.bfloat16), pinned(), inner="inductor"
        )
        outputs = run_all(fast, make_inputs(6, dtype=torch.bfloat16))
    assert all(site.computed[1:3] == (0, 1) for site in run.report().sites if site.kind == "mlp")
    for number in (1, 2):
        scale = expected[number].abs().max()
        assert (outputs[number] - expected[number]).abs().max() < 0.1 * scale
        assert (plain[number] - expected[number]).abs().max() > 0.5 * scale


@pytest.mark.slow(reason="inductor; the model of the paper is one of diffusers too")
def test_a_diffusers_model_with_scores_from_its_attention() -> None:
    """The choice itself may differ in single precision; full steps, and steps that compute all or
    nothing, do not.
    """
    model, inputs = tiny("diffusers", layers=2), make_inputs(4)
    policy = make_policy(
        sampler={"steps": 6},
        R={"base": 0.5, "step_weight": -0.99},
        rules=[{"match": "mlp", "layers": 1, "R": {"base": 0.0}}],
    )
    with toca_fx.session() as run:
        outputs = run_all(toca_fx.compile(model, policy), inputs)
    expected = run_all(model, inputs)
    assert run.report().compiled_graphs == 2
    assert [close(a, b) for a, b in zip(outputs, expected, strict=True)] == [
        True,
        False,
        False,
        True,
    ]
    assert [step.kind for step in run.report().steps] == ["full", "partial", "partial", "full"]


PARTIAL = {
    kind: {"weight": 1.0}
    for kind in ("self_attention", "cross_attention", "joint_attention", "mlp")
}
OF_THE_PAPER: dict[str, tuple[str, dict[str, Any]]] = {
    "chosen in the graph, for both halves, over a grid": (
        "PixArtTransformer2DModel",
        {
            "guidance": {"layout": "batched", "selection": "shared"},
            "modules": {"cross_attention": {"weight": 0.6}, "mlp": {"weight": 1.6}},
            "scores": {"cross_attention": 1.0, "staleness": 0.25},
            "spatial": {"bonus": 0.4, "grid": 4},
        },
    ),
    "joint streams and parallel blocks": ("FluxTransformer2DModel", {}),
    "keys and values kept": ("PixArtTransformer2DModel", {"modules": PARTIAL}),
    "keys and values of joint streams kept": ("FluxTransformer2DModel", {"modules": PARTIAL}),
}


@pytest.mark.parametrize(
    "case",
    slow_but(
        ["chosen in the graph, for both halves, over a grid"],
        OF_THE_PAPER,
        "inductor; one model is enough",
    ),
)
def test_a_model_of_the_paper_in_double_precision(case: str) -> None:
    """There both compilers choose the same tokens, though diffusers keeps the sinusoids of
    timesteps in single precision.
    """
    name, sections = OF_THE_PAPER[case]
    example = examples()[name]
    model, first = build(example, dtype=torch.float64)
    calls = [vary(example, first, step, STEPS) for step in range(6)]
    policy = make_policy(sampler={"steps": 6}, **sections)
    outputs: list[list[Tensor]] = []
    for compiler in ("inductor", "eager"):
        fast = toca_fx.compile(model, policy, inner=compiler)
        with torch.no_grad(), toca_fx.session() as run:
            outputs.append([prediction(fast(**call))[0].clone() for call in calls])
        assert run.report().compiled_graphs == 2
    assert [step.kind for step in run.report().steps] == ["full", "partial", "partial"] * 2
    for step, (ours, theirs) in enumerate(zip(*outputs, strict=True)):
        assert close(ours, theirs), f"step {step}"


@pytest.mark.slow(reason="inductor goes through AOTAutograd too")
def test_aot_eager_equals_eager() -> None:
    model, inputs = tiny("diffusers", layers=2), make_inputs(STEPS)
    outputs = []
    for compiler in ("aot_eager", "eager"):
        with toca_fx.session():
            outputs.append(run_all(toca_fx.compile(model, pinned(), inner=compiler), inputs))
    assert all(close(a, b) for a, b in zip(*outputs, strict=True))
