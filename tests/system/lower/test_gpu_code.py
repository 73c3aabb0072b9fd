"""Every kind of step, lowered for a GPU that is not there: no size is guarded, and the kernels are
those that are expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import make_policy, program_of
from tests.made_up_cuda import Lowered, fake_example, made_up_cuda
from tests.marks import slow_but
from toca_fx.capture.aten import to_aten
from toca_fx.capture.dynamo import capture
from toca_fx.capture.sizes import Sizes
from toca_fx.examples import examples
from toca_fx.graph import roles
from toca_fx.lower.analysis import Analysis
from toca_fx.lower.compiler import Inner
from toca_fx.lower.program import Program
from toca_fx.lower.sizes import Shared
from toca_fx.lower.step import CompiledStep
from toca_fx.match.matcher import match
from toca_fx.plan.planner import Planner

MODELS = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "FluxTransformer2DModel",
    "LatteTransformer3DModel",
)
DTYPES = ("float32", "bfloat16")


@cache
@torch.no_grad()
def lower(
    model: str,
    dtype: str,
    interval: int = 3,
    grain: str = "module",
    order: int = 0,
    reused: bool = False,
) -> tuple[dict[str, CompiledStep], dict[str, Lowered]]:
    """The steps of a generation by kind, and what was lowered for each; once for all tests."""
    forecast = {"basis": "newton", "order": order}
    sections: dict[str, Any] = {"modules": {"mlp": "reuse"}} if reused else {}
    policy = make_policy(
        N={"base": interval}, cache={"grain": grain}, forecast=forecast, **sections
    )
    steps: dict[str, CompiledStep] = {}
    found: dict[str, Lowered] = {}
    with made_up_cuda():
        with FakeTensorMode(allow_non_fake_inputs=True):
            module, call = fake_example(examples()[model], getattr(torch, dtype))
            captured, inputs = capture(module, (), call)
        program = program_of(captured, inputs, policy, "inductor")
        plan = program.analysis.plan(None)
        for step in plan.steps:
            if step.kind not in steps:
                with made_up_cuda() as found[step.kind]:
                    steps[step.kind] = program.step(plan, step.modes)
    return steps, found


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], DTYPES, "in another precision"))
@pytest.mark.parametrize(
    "model", slow_but(["DiTTransformer2DModel"], MODELS, "one system lowered for a GPU is enough")
)
def test_no_size_is_guarded(model: str, dtype: str) -> None:
    steps, found = lower(model, dtype)
    assert set(steps) == {"full", "partial"}
    for kind, step in steps.items():
        assert not step.conditions, kind
        assert found[kind].kernels, kind


@pytest.mark.slow(reason="lowers one more system for a GPU")
def test_half_precision_takes_the_kernels_that_are_expected() -> None:
    """Full: attention and s1 in one operator. Partial: no attention at all, as all of it is reused;
    a handful of launches a block.
    """
    steps, found = lower("FluxTransformer2DModel", "bfloat16")
    plan = steps["full"]._plan
    scoring = {plan.sites[plan.sites[i].influence or 0].anchor for i in plan.scored_by_attention}
    graph = steps["full"].graph.module.graph
    operators = [
        node
        for node in graph.nodes
        if node.target is torch.ops.toca_fx.attention_and_columns.default
    ]
    assert len(operators) == len(scoring)
    assert found["full"].calls(r"torch\.ops\.toca_fx\.attention_and_columns\.default\(") == len(
        scoring
    ), "each lies in a piece of its own"
    for kind in ("full", "partial"):
        assert not found[kind].calls(r"_scaled_dot_product"), kind
    assert not found["partial"].calls("attention_and_columns")


@pytest.mark.slow(reason="lowers two more systems for a GPU")
def test_attention_that_nobody_scores_is_that_of_the_model() -> None:
    """An interval of one caches nothing, and asks for no scores: SDPA's own choice of a kernel
    stays in the graph.
    """
    _, found = lower("FluxTransformer2DModel", "bfloat16", interval=1)
    assert found["full"].calls(r"_scaled_dot_product_cudnn_attention\.default\(") == 4
    assert not found["full"].calls("attention_and_columns")
    _, found = lower("PixArtTransformer2DModel", "float32", interval=1)
    assert found["full"].calls(r"_scaled_dot_product_efficient_attention\.default\(") == 2, (
        "equal blocks are compiled once"
    )


def test_launches_of_a_partial_step() -> None:
    """Per block of DiT: gather, norm and modulation; two products; the activation; the scatter;
    gate and add.
    """
    _, found = lower("DiTTransformer2DModel", "bfloat16")
    (block,) = [code for code in found["partial"].codes if "gelu" in code]
    body = block[block.rindex("def call(") :]
    assert body.count("extern_kernels.addmm(") == 2
    assert body.count(".run(") <= 5
    assert "device=device(type='cpu')" not in body


def body_of(code: str) -> str:
    """The calls of kernels in generated code."""
    return code[code.rindex("def call(") :]


@pytest.mark.parametrize(
    "model", slow_but(["DiTTransformer2DModel"], MODELS, "one system lowered for a GPU is enough")
)
def test_a_skip_forecasts_in_one_kernel(model: str) -> None:
    """The sum over a history is fused with what follows, the weights are read on the device, and
    what a skip leaves out is not there.
    """
    steps, found = lower(model, "bfloat16", grain="output", order=2)
    assert set(steps) == {"full", "skip"}
    assert not steps["skip"].conditions
    (code,) = found["skip"].codes
    assert body_of(code).count(".run(") == len(
        steps["skip"].graph.module.graph.find_nodes(op="output")[0].all_input_nodes
    )
    assert "extern_kernels" not in body_of(code)
    assert ".cpu()" not in code
    (kernel, *_) = found["skip"].kernels
    assert kernel.source.count("tl.load(") == 3 + 3, "values and weights"
    assert ".to(tl.float32)" in kernel.source


def test_a_skip_of_the_state_runs_the_output_layers() -> None:
    _, found = lower("DiTTransformer2DModel", "bfloat16", grain="model", order=2)
    (code,) = found["skip"].codes
    # One product, that to patches. The sum, the norm and the modulation are one kernel; the patches
    # are put in order by another.
    products = body_of(code).count("extern_kernels.")
    assert (products, body_of(code).count(".run(")) == (1, 2)
    assert not found["skip"].calls("attention")


@pytest.mark.parametrize(
    "grain", slow_but(["module"], ["module", "block"], "the more memories, the more to be seen")
)
def test_histories_add_no_launch(grain: str) -> None:
    """The weighted sum is computed where the cache was read."""
    launches = []
    for order in (0, 2):
        _, found = lower("DiTTransformer2DModel", "bfloat16", 3, grain, order, reused=True)
        launches.append(
            {
                kind: sum(body_of(code).count(".run(") for code in each.codes)
                for kind, each in found.items()
            }
        )
    assert launches[0] == launches[1]


@pytest.mark.slow(reason="lowers a system for a GPU with symbols for its sizes")
@torch.no_grad()
def test_of_sizes_no_more_is_asked_than_that_indices_are_wide_enough() -> None:
    """A text and an image of other lengths take the code that is there."""
    axes = {"hidden_states": 1, "img_ids": 0, "encoder_hidden_states": 1, "txt_ids": 0}
    policy, shared = make_policy(N={"base": 3}), Shared()

    def program_at(sizes: Any, others: Sequence[Analysis] = ()) -> Program:
        aten = to_aten(captured, inputs, sizes=sizes)
        planner = Planner(policy, match(aten.graph), roles.aspect(aten.graph))
        return Program(Analysis(aten, planner), Inner(), shared, others)

    with made_up_cuda():
        with FakeTensorMode(allow_non_fake_inputs=True):
            module, call = fake_example(examples()["FluxTransformer2DModel"], torch.bfloat16)
            for name, axis in axes.items():
                torch._dynamo.mark_dynamic(call[name], axis)
            captured, inputs = capture(module, (), call)
        symbols = Sizes(captured)
        shared = Shared(symbols.expressions, symbols.names)
        own = symbols.of(inputs)
        first, second, *_ = symbols.others(own)
        known = [program_at(first).analysis]
        for program, compiled in ((program_at(own, known), 2), (program_at(second), 0)):
            before, plan = shared.compiled, program.analysis.plan(None)
            for step in plan.steps[:2]:
                assert not program.step(plan, step.modes).conditions
            assert shared.compiled - before == compiled
    bounds = [guard for codes in shared._codes.values() for code in codes for guard in code._guards]
    assert bounds
    for bound in bounds:
        assert isinstance(bound, sympy.LessThan) or "Mod" in str(bound), bound
