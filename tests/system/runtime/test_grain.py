"""Generations with caches of whole blocks (cache.grain: block): what they give, and their bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import (
    analysis_of,
    capture,
    make_inputs,
    make_policy,
    programs,
    run_all,
    text_inputs,
    tiny,
)
from tests.marks import slow_but
from toca_fx.examples import build, examples
from toca_fx.graph.ops import aten

REUSED = {"modules": {"mlp": "reuse"}, "scores": {"staleness": 1.0}}

TOGETHER = {**REUSED, "cache": {"grain": "block"}}


def test_plans_of_other_lengths_share_no_graph_that_caches_otherwise() -> None:
    """In three steps all are reused together, in twelve they are not."""
    policy = make_policy(**TOGETHER, rules=[{"match": "mlp", "N": {"base": 6}}])
    model, inputs = tiny("original", layers=2).double(), list(make_inputs(12, dtype=torch.float64))
    for lengths in ((3, 12), (12, 3)):
        torch._dynamo.reset()
        fast, outputs = toca_fx.compile(model, policy, inner="eager"), {}
        for length in lengths:
            with toca_fx.session(num_steps=length) as run:
                outputs[length] = run_all(fast, inputs[:length])
            (program,) = programs(run)
        assert program.analysis.plan(3).runs
        assert not program.analysis.plan(12).runs
        for length, found in outputs.items():
            torch._dynamo.reset()
            with toca_fx.session(num_steps=length):
                alone = run_all(toca_fx.compile(model, policy, inner="eager"), inputs[:length])
            for one, other in zip(found, alone, strict=True):
                assert torch.equal(one, other)


def test_a_run_may_end_in_another_type_than_it_began() -> None:
    class Gated(nn.Module):
        """An MLP in bfloat16, then one whose output is gated in float32."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).bfloat16()
            self.second = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).bfloat16()
            self.gate = nn.Parameter(torch.ones(32))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return (x + self.gate * self.second(x)).bfloat16()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Gated(), Gated()])

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model, x = Model(), torch.randn(1, 16, 32).bfloat16()
    policy = make_policy(**TOGETHER)
    captured, flat = capture(model, x, torch.tensor([1.0]))
    found = analysis_of(captured, flat, policy)
    plan = found.plan(None)
    assert plan.runs
    with toca_fx.session() as run, torch.no_grad():
        fast = toca_fx.compile(model, policy, inner="eager")
        full, partial = (fast(x, torch.tensor([t])) for t in (1.0, 0.9))
    assert run.report().cache_bytes == found.nbytes(plan)
    assert full.dtype == partial.dtype == torch.bfloat16
    assert torch.allclose(full.float(), partial.float(), rtol=0.02, atol=0.02)


def test_a_partial_step_adds_what_the_last_full_one_added() -> None:
    """Against hooks on the blocks of the model itself."""
    model, inputs = tiny("original", layers=3).double(), make_inputs(dtype=torch.float64)
    with toca_fx.session() as run:
        ours = run_all(toca_fx.compile(model, make_policy(**TOGETHER), inner="eager"), inputs)
        report = run.report()
    added: dict[nn.Module, Tensor] = {}
    kind = ""

    def hook(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if kind == "full":
            added[block] = output - args[0]
        return args[0] + added[block]

    handles = [block.register_forward_hook(hook) for block in model.blocks]  # type: ignore[union-attr]
    for step, call, output in zip(report.steps, inputs, ours, strict=True):
        kind = step.kind
        (expected,) = run_all(model, [call])
        assert (output - expected).abs().max() < 1e-10, (step.index, kind)
    for handle in handles:
        handle.remove()
    assert {step.kind for step in report.steps} == {"full", "partial"}
    assert report.cache_bytes == 3 * 2 * 64 * 32 * 8


@pytest.mark.parametrize("kind", slow_but(["joint"], ["cross", "joint"], "one model is enough"))
def test_gates_that_do_not_change_make_it_equal_to_caches_of_modules(kind: str) -> None:
    model, inputs = tiny(kind, layers=2).double(), text_inputs()
    inputs = [(x, inputs[0][1], text) for x, _, text in inputs]
    told = [float(t[0]) for _, t, _ in inputs]
    outputs = {}
    for grain in ("module", "block"):
        policy = make_policy(**{**TOGETHER, "cache": {"grain": grain}})
        # The timestep and one condition stay, captions are new: nothing but a name tells the steps.
        with toca_fx.session(timesteps=told) as run, toca_fx.branch("only"):
            outputs[grain] = run_all(toca_fx.compile(model, policy, inner="eager"), inputs)
            (program,) = programs(run)
    assert bool(program.analysis.plan(None).runs)
    for one, other in zip(outputs["module"], outputs["block"], strict=True):
        assert (one - other).abs().max() < 1e-10 * one.abs().max()
    assert (outputs["block"][1] - run_all(model, inputs)[1]).abs().max() > 1e-3, (
        "partial steps do reuse"
    )
    plan = program.analysis.plan(None)
    partial = program.analysis.step_graph(plan, plan.steps[1].modes).module.graph
    blocks = [node for node in partial.nodes if "blocks" in node.meta.get("path", "")]
    assert not [
        node
        for node in blocks
        if node.target in (aten.scaled_dot_product_attention.default, aten.layer_norm.default)
    ]


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["DiTTransformer2DModel"],
        [
            "DiTTransformer2DModel",
            "PixArtTransformer2DModel",
            "FluxTransformer2DModel",
            "SD3Transformer2DModel",
        ],
        "of the classes, one is enough",
    ),
)
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["model", "bfloat16"], "one dtype"))
def test_bytes_are_predicted_and_fewer(name: str, dtype: str) -> None:
    model, inputs = build(examples()[name], dtype=torch.float64)
    captured, flat = capture(model, **inputs)
    sizes = {}
    for grain in ("module", "block"):
        policy = make_policy(**{**TOGETHER, "cache": {"grain": grain, "dtype": dtype}})
        found = analysis_of(captured, flat, policy)
        sizes[grain] = found.nbytes(found.plan(None))
        torch._dynamo.reset()
        with toca_fx.session() as run, torch.no_grad():
            fast = toca_fx.compile(model, policy, inner="eager")
            for _ in range(2):
                fast(**inputs)
        assert run.report().cache_bytes == sizes[grain]
    assert sizes["block"] <= sizes["module"] / 2


@pytest.mark.slow(reason="inductor with memories of blocks")
def test_inductor_keeps_to_it() -> None:
    model, outputs = tiny("original", layers=2), []
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        with toca_fx.session() as run:
            outputs.append(
                run_all(toca_fx.compile(model, make_policy(**TOGETHER), inner=inner), make_inputs())
            )
        assert run.report().compiled_graphs == 2
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
