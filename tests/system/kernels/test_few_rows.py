"""Linear layers of few rows: the same numbers from either library, and which layers of which steps
decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

import toca_fx
from tests.helpers import capture, make_inputs, make_policy, programs, run_all, tiny
from toca_fx.graph.ops import aten
from toca_fx.kernels.few_rows import linear, use_few_rows


@pytest.mark.parametrize("rows", [0, 1, 2, 63, 64, 65, 256, 257])
@pytest.mark.parametrize("sizes", [(24, 96), (96, 24), (24, 24)])
@pytest.mark.parametrize("biased", [True, False])
def test_both_libraries_give_the_same(rows: int, sizes: tuple[int, int], biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, rows, sizes[0]), torch.randn(sizes[1], sizes[0])
    bias = torch.randn(sizes[1]) if biased else None
    found = linear(x, weight, bias)
    assert found.shape == (1, rows, sizes[1])
    assert torch.allclose(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "sizes", "few"),
    [(256, (24, 96), True), (257, (24, 96), False), (64, (96, 24), True), (65, (96, 24), False)],
)
def test_the_number_of_rows_decides(rows: int, sizes: tuple[int, int], few: bool) -> None:
    with torch.profiler.profile() as profile:
        linear(torch.randn(rows, sizes[0]), torch.randn(sizes[1], sizes[0]), None)
    assert ("mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}) == few


def test_only_layers_of_fresh_tokens_in_float32_decide() -> None:
    for dtype, expected in ((torch.float32, 2), (torch.float64, 0)):
        model = tiny("original", layers=1).to(dtype)
        x, t, y = next(iter(make_inputs(1, dtype=dtype)))
        captured, inputs = capture(model, x, t=t, y=y)
        program = toca_fx.lower.program.Program(
            captured, inputs, make_policy(), toca_fx.lower.compiler.Inner("eager")
        )
        plan = program.plan(None)
        graph = program.step_graph(plan, plan.steps[1].modes)
        before = len(graph.module.graph.find_nodes(op="call_function", target=aten.linear.default))
        use_few_rows(graph.module.graph, set().union(*graph.fresh_nodes.values()))
        after = graph.module.graph.find_nodes(
            op="call_function", target=torch.ops.toca_fx.linear.default
        )
        assert len(after) == expected
        assert (
            len(graph.module.graph.find_nodes(op="call_function", target=aten.linear.default))
            == before - expected
        )
        # Another compiler gets the graph as it is.
        assert not [
            node
            for node in program.step(plan, plan.steps[1].modes)._run.__self__.graph.nodes
            if "toca_fx" in str(node.target)
        ]


class Quantised(nn.Module):
    """A linear layer whose weight is computed: int8 and a scale."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.register_buffer(
            "weight", torch.randint(-127, 128, (outside, inside), dtype=torch.int8)
        )
        self.register_buffer("scale", torch.full((outside, 1), 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def test_a_weight_that_is_computed_counts_by_its_type() -> None:
    for dtype, expected in ((torch.float32, 2), (torch.float64, 0)):
        torch._dynamo.reset()
        model = tiny("original", layers=1).to(dtype)
        mlp = model.blocks[0].mlp  # type: ignore[union-attr, index]
        for name, child in list(mlp.named_modules()):
            if isinstance(child, nn.Linear):
                mlp.set_submodule(name, Quantised(child.in_features, child.out_features))
        x, t, y = next(iter(make_inputs(1, dtype=dtype)))
        captured, inputs = capture(model, x, t=t, y=y)
        program = toca_fx.lower.program.Program(
            captured, inputs, make_policy(), toca_fx.lower.compiler.Inner("eager")
        )
        graph = program.step_graph(program.plan(None), program.plan(None).steps[1].modes)
        use_few_rows(graph.module.graph, set().union(*graph.fresh_nodes.values()))
        assert (
            len(
                graph.module.graph.find_nodes(
                    op="call_function", target=torch.ops.toca_fx.linear.default
                )
            )
            == expected
        )


def test_autocast_gets_what_it_casts() -> None:
    """The operator is unknown to it."""
    model, outputs = tiny("original", layers=1), []
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        with toca_fx.session(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(
                run_all(
                    toca_fx.compile(model, make_policy(scores={"random": 1.0}), inner=inner),
                    make_inputs(),
                )
            )
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours.float() - theirs.float()).abs().max() < 0.05 * theirs.float().abs().max()


def test_inductor_gets_the_operator_and_flops_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    inductor = lookup_backend("inductor")

    def noting(module: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        seen.extend(node.target for node in module.graph.nodes)
        return inductor(module, inputs, **options)

    monkeypatch.setattr(
        "toca_fx.lower.compiler.lookup_backend",
        lambda name: noting if name == "inductor" else lookup_backend(name),
    )
    model, flops, outputs = tiny("original", layers=2), [], []
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        with toca_fx.session() as run:
            outputs.append(
                run_all(
                    toca_fx.compile(model, make_policy(scores={"random": 1.0}), inner=inner),
                    make_inputs(),
                )
            )
            flops.append(run.report().flops_done)
            (_,) = programs(run)
    assert torch.ops.toca_fx.linear.default in seen
    assert flops[0] == flops[1]
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
