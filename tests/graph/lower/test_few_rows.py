"""Which linear layers of which steps decide by their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.helpers import analysis_of, capture, make_inputs, make_policy, tiny
from toca_fx.graph.ops import aten
from toca_fx.lower.compiler import Inner
from toca_fx.lower.program import Program
from toca_fx.lower.step import use_few_rows


@dataclass
class Other:
    """A compiler that leaves graphs as they are."""

    given: list[fx.GraphModule]

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.given.append(module)
        return module.forward


def test_only_layers_of_fresh_tokens_in_float32_decide() -> None:
    for dtype, expected in ((torch.float32, 2), (torch.float64, 0)):
        model = tiny("original", layers=1).to(dtype)
        x, t, y = next(iter(make_inputs(1, dtype=dtype)))
        captured, inputs = capture(model, x, t=t, y=y)
        program = analysis_of(captured, inputs, make_policy())
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
        other = Other([])
        Program(program, Inner(other)).step(plan, plan.steps[1].modes)
        assert other.given
        assert not any("toca_fx" in module.code for module in other.given)


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
        program = analysis_of(captured, inputs, make_policy())
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
