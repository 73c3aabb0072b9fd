"""Step graphs with histories: what full steps write, what other steps read, and what skips lack."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.helpers import capture_tiny, make_policy
from toca_fx.graph.ops import aten
from toca_fx.lower import blocks as regions
from toca_fx.lower.fake_inputs import FakeInputs
from toca_fx.match.matcher import match
from toca_fx.plan.buffers import Buffer, memory
from toca_fx.plan.plan import Plan
from toca_fx.plan.planner import make_plan
from toca_fx.rewrite.hoist import find_hoistable
from toca_fx.rewrite.step import rewrite
from toca_fx.rewrite.step_graph import StepGraph

LAYERS, SITES = 3, 6
REUSED: dict[str, Any] = {"modules": {"mlp": "reuse"}, "scores": {"staleness": 1.0}}
ORDER_2 = {"basis": "newton", "order": 2}


class Steps:
    """The plan of a tiny DiT, and its step graphs by kind."""

    def __init__(self, layers: int = LAYERS, **sections: Any) -> None:
        self.source, self.inputs = capture_tiny("original", layers)
        self.plan: Plan = make_plan(match(self.source.graph), make_policy(**sections))

    def __getitem__(self, kind: str) -> StepGraph:
        modes = next(step.modes for step in self.plan.steps if step.kind == kind)
        return rewrite(self.source, self.plan.step(modes))


def operators(graph: StepGraph) -> Counter[Any]:
    nodes = graph.module.graph.nodes
    return Counter(node.target for node in nodes if node.op == "call_function")


def computing(graph: StepGraph) -> set[str]:
    """The modules of the model whose nodes are left."""
    nodes = graph.module.graph.nodes
    return {
        node.meta["path"] for node in nodes if node.op == "call_function" and "stack" in node.meta
    }


def readers(graph: StepGraph) -> dict[Buffer, list[fx.Node]]:
    """Who reads each buffer: all users but the writes to it."""
    nodes = {node.name: node for node in graph.module.graph.find_nodes(op="placeholder")}
    found = {}
    for buffer in graph.buffers:
        node = nodes[buffer.name]
        found[buffer] = [
            user
            for user in node.users
            if user.target is not aten.copy_.default or user.args[1] is node
        ]
    return found


def written(graph: StepGraph) -> list[str]:
    writes = graph.module.graph.find_nodes(op="call_function", target=aten.copy_.default)
    return [node.args[0].name for node in writes]


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_a_full_step_writes_one_tensor_per_unit_and_reads_none(order: int) -> None:
    full = Steps(**REUSED, forecast={"basis": "newton", "order": order})["full"]
    newest = [memory(i, order + 1)[0] for i in range(SITES)]
    assert set(full.buffers) == set(newest)
    assert written(full) == [buffer.name for buffer in newest]
    assert not any(readers(full).values())


@pytest.mark.parametrize("order", [1, 2, 5])
def test_a_reused_unit_reads_its_history_and_one_vector_of_weights(order: int) -> None:
    partial = Steps(**REUSED, forecast={"basis": "newton", "order": order})["partial"]
    expected = {
        buffer for i in range(SITES) for buffer in (*memory(i, order + 1), Buffer("weights", i))
    }
    assert set(partial.buffers) == expected
    assert all(len(found) == 1 for found in readers(partial).values())
    assert written(partial) == []
    assert operators(partial)[aten.scaled_dot_product_attention.default] == 0


def test_fresh_tokens_replace_the_newest_value_and_the_forecast() -> None:
    partial = Steps(forecast=ORDER_2)["partial"]
    mlps = range(1, SITES, 2)
    assert written(partial) == [memory(i, 3)[0].name for i in mlps]
    assert operators(partial)[aten.index_put.default] == 2 * len(mlps)
    assert {buffer.site for buffer in partial.buffers if buffer.role == "weights"} == {
        *range(SITES)
    }
    # Both get the same rows, which are computed once.
    scatters = partial.module.graph.find_nodes(op="call_function", target=aten.index_put.default)
    assert len({node.args[2] for node in scatters}) == len(mlps)


def test_a_skip_of_the_grain_of_the_model_runs_the_output_layers_only() -> None:
    steps = Steps(cache={"grain": "model"}, forecast=ORDER_2)
    full, skip = steps["full"], steps["skip"]
    state = SITES
    assert set(full.buffers) == {memory(state, 3)[0]}
    assert written(full) == [memory(state, 3)[0].name]
    assert set(skip.buffers) == {*memory(state, 3), Buffer("weights", state)}
    assert written(skip) == []
    assert not any("blocks" in path for path in computing(skip))
    found = operators(skip)
    assert not found[aten.scaled_dot_product_attention.default] + found[aten.gelu.default]
    assert any("final_layer" in path for path in computing(skip))


def test_a_skip_of_the_grain_of_the_output_runs_nothing_of_the_model() -> None:
    steps = Steps(cache={"grain": "output"}, forecast=ORDER_2)
    skip = steps["skip"]
    assert skip.kept == ()
    assert set(skip.buffers) == {*memory(SITES, 3), Buffer("weights", SITES)}
    assert computing(skip) == set()
    assert written(steps["full"]) == [memory(SITES, 3)[0].name]


def test_steps_that_are_skipped_between_partial_ones() -> None:
    steps = Steps(skip="alternate", N={"base": 4}, forecast=ORDER_2)
    skip, partial = steps["skip"], steps["partial"]
    assert {buffer.site for buffer in skip.buffers} == {SITES}
    assert memory(SITES, 3)[0].name in written(partial), "its state is one of those forecast from"
    assert not {*memory(SITES, 3)[1:], Buffer("weights", SITES)} & {*partial.buffers}


@pytest.mark.parametrize("grain", ["module", "block", "model", "output"])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_there_is_one_graph_per_kind(grain: str, order: int) -> None:
    sections = {**REUSED, "N": {"base": 4, "first": 5, "last": 2}, "sampler": {"steps": 50}}
    forecast = {"basis": "taylor", "order": order}
    plan = Steps(**sections, cache={"grain": grain}, forecast=forecast).plan
    specs = {(step.kind, plan.step(step.modes)) for step in plan.steps}
    assert len(specs) == 2
    assert len({kind for kind, _ in specs}) == 2


def compiled_pieces(layers: int, kind: str, **sections: Any) -> int:
    """How many graphs a compiler is given for one kind of step."""
    steps, compiled = Steps(layers, **sections), list[fx.GraphModule]()
    hoisted = find_hoistable(steps.source.graph, steps.plan.sites, 2**20)
    modes = next(step.modes for step in steps.plan.steps if step.kind == kind)
    graph = rewrite(steps.source, steps.plan.step(modes, hoisted.names))

    def compiler(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        compiled.append(module)
        return module.forward

    fake = FakeInputs(graph, steps.source, steps.plan)
    module = fx.GraphModule(graph.module, copy.deepcopy(graph.module.graph))
    regions.compile_regions(module, [*fake.symbolic({}).inputs], compiler, fake.mode)
    return len(compiled)


@pytest.mark.parametrize("kind", ["full", "partial"])
@pytest.mark.parametrize("sections", [REUSED, {}, {**REUSED, "cache": {"grain": "block"}}])
def test_equal_blocks_are_compiled_once_with_histories_too(
    kind: str, sections: dict[str, Any]
) -> None:
    plain = compiled_pieces(12, kind, **sections)
    assert plain <= 3, "before, block, after"
    assert compiled_pieces(12, kind, **sections, forecast=ORDER_2) == plain


def test_what_is_read_is_the_weighted_sum() -> None:
    """The step graph against the model, whose module outputs are replaced by hand."""
    steps = Steps(1, **REUSED, forecast=ORDER_2)
    partial, generator = steps["partial"], torch.Generator().manual_seed(0)
    weights = torch.tensor([3.0, -3.0, 1.0], dtype=torch.float64)
    given: dict[Buffer, Tensor] = {
        buffer: weights
        if buffer.role == "weights"
        else torch.randn(2, 64, 32, generator=generator, dtype=torch.float64)
        for buffer in partial.buffers
    }
    sums = {
        site.output: sum(
            weight * given[buffer] for weight, buffer in zip(weights, memory(i, 3), strict=True)
        )
        for i, site in enumerate(steps.plan.sites)
    }

    class Replaced(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            return sums[n.name] if n.name in sums else super().run_node(n)

    with torch.no_grad():
        (ours,) = partial.module(
            *(steps.inputs[at] for at in partial.kept),
            *(given[buffer] for buffer in partial.buffers),
        )
        (expected,) = Replaced(steps.source).run(*steps.inputs)
    assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12)
