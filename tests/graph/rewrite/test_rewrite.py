"""The step graphs: which operators they have, where the gather sits, and the numbers they give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.helpers import KINDS, capture_tiny, make_policy
from toca_fx.match.matcher import match
from toca_fx.plan.buffers import READ, Buffer
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.plan.planner import make_plan
from toca_fx.rewrite.step import rewrite
from toca_fx.rewrite.step_graph import StepGraph

aten = torch.ops.aten

LAYERS, BATCH, TOKENS, CHANNELS = 3, 2, 64, 32

# Linears per block: q, k, v, out (or qkv, proj); the two of the MLP; modulation; embedders. The
# rest: output and embedders.
ATTENTION = {"diffusers": 4, "original": 2}

BLOCK = {"diffusers": 2 + 1 + 2, "original": 2 + 1}

REST = {"diffusers": 2 + 2, "original": 2 + 2}

VIEWS = (aten.view.default, aten.reshape.default, aten.transpose.int, aten.unsqueeze.default)


class Graphs:
    """A tiny model's source graph, its real inputs and a plan."""

    def __init__(self, kind: str, **sections: Any) -> None:
        self.source, self.inputs = capture_tiny(kind, LAYERS, BATCH)
        self.plan = make_plan(match(self.source.graph), make_policy(**sections))

    def step(self, kind: str) -> StepPlan:
        return next(step for step in self.plan.steps if step.kind == kind)

    def graph(self, kind: str) -> StepGraph:
        return rewrite(self.source, self.plan.step(self.step(kind).modes))


_SOURCES: dict[str, Graphs] = {}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def graphs(kind: str) -> Graphs:
    if kind not in _SOURCES:
        _SOURCES[kind] = Graphs(kind)
    return _SOURCES[kind]


def with_policy(graphs: Graphs, **sections: Any) -> Graphs:
    """The same source under another policy."""
    other = object.__new__(Graphs)
    other.source, other.inputs = graphs.source, graphs.inputs
    other.plan = make_plan(match(graphs.source.graph), make_policy(**sections))
    return other


def count(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes if node.op == "call_function")


def behind_views(node: Any) -> fx.Node:
    while node.target in VIEWS:
        node = node.args[0]
    return node


def sites_with(graph: StepGraph, role: str) -> tuple[int, ...]:
    """The sites that have a buffer of this role in the graph."""
    return tuple(sorted(buffer.site for buffer in graph.buffers if buffer.role == role))


def buffers(plan: Plan, graph: StepGraph) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    caches = {
        i: torch.randn(plan.sites[i].shape, generator=generator, dtype=torch.float64)
        for i in sites_with(graph, "cache")
    }
    return caches, {
        i: torch.zeros(plan.sites[i].shape[:2], dtype=torch.float64)
        for i in sites_with(graph, "score")
    }


def run(
    graphs: Graphs,
    graph: StepGraph,
    caches: dict[int, Tensor],
    scores: dict[int, Tensor],
    rows: Sequence[Tensor] = (),
) -> list[Tensor]:
    with torch.no_grad():
        chosen = dict(zip(sites_with(graph, "order"), rows, strict=True))
        ranks = {i: torch.arange(order.shape[1]) for i, order in chosen.items()}
        tensors = {"cache": caches, "score": scores, "order": chosen, "ranks": ranks}
        return list(
            graph.module(
                *(graphs.inputs[i] for i in graph.kept),
                *(tensors[buffer.role][buffer.site] for buffer in graph.buffers),
            )
        )


def all_rows() -> Tensor:
    return torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS)


# The source graph that all counts refer to


def test_the_source(graphs: Graphs, kind: str) -> None:
    operators = count(graphs.source.graph)
    assert operators[aten.linear.default] == LAYERS * (ATTENTION[kind] + BLOCK[kind]) + REST[kind]
    assert operators[aten.scaled_dot_product_attention.default] == LAYERS
    assert operators[aten.layer_norm.default] == 2 * LAYERS + 1


def test_rewriting_leaves_the_source_alone(graphs: Graphs) -> None:
    before = [(node.format_node(), dict(node.meta)) for node in graphs.source.graph.nodes]
    code = graphs.source.code
    for step in ("full", "partial"):
        graphs.graph(step)
    assert [(node.format_node(), dict(node.meta)) for node in graphs.source.graph.nodes] == before
    assert graphs.source.code == code


# Full steps


def test_operators_of_a_full_step(graphs: Graphs) -> None:
    graph = graphs.graph("full")
    source, operators = count(graphs.source.graph), count(graph.module.graph)
    assert operators[aten.linear.default] == source[aten.linear.default]
    assert operators[aten.layer_norm.default] == source[aten.layer_norm.default]
    assert operators[aten.copy_.default] == 2 * LAYERS + LAYERS  # caches and scores
    assert (
        not operators[aten.index_put.default]
        + operators[aten.index.Tensor]
        + operators[aten.softmax.int]
    )
    assert graph.kept == tuple(range(len(graphs.inputs)))
    assert {*graph.buffers} == {
        *(Buffer("cache", i) for i in range(2 * LAYERS)),
        Buffer("score", 1),
        Buffer("score", 3),
        Buffer("score", 5),
    }


def test_every_attention_map_is_computed_once(graphs: Graphs) -> None:
    """The two products with queries, keys and values, in whatever form; s1 adds none."""
    operators = count(graphs.graph("full").module.graph)
    products = (
        operators[aten.matmul.default]
        + operators[aten.bmm.default]
        - count(graphs.source.graph)[aten.matmul.default]
    )
    fused = (
        operators[aten.scaled_dot_product_attention.default]
        + operators[aten._scaled_dot_product_flash_attention_for_cpu.default]
    )
    assert products + 2 * fused == 2 * LAYERS


def test_scores_without_attention_leave_it_to_the_kernel(graphs: Graphs) -> None:
    for scores, written in (({"staleness": 1.0}, 0), ({"value_norm": 1.0}, LAYERS)):
        graph = with_policy(graphs, scores=scores).graph("full")
        operators = count(graph.module.graph)
        assert operators[aten.scaled_dot_product_attention.default] == LAYERS
        assert operators[aten.copy_.default] == 2 * LAYERS + written


def test_a_full_step_computes_the_model_and_fills_the_caches(graphs: Graphs) -> None:
    graph = graphs.graph("full")
    caches, scores = buffers(graphs.plan, graph)
    before = [cache.clone() for cache in caches.values()]
    outputs = run(graphs, graph, caches, scores)
    with torch.no_grad():
        for output, expected in zip(outputs, graphs.source(*graphs.inputs), strict=True):
            assert (output - expected).abs().max() < 1e-12
        values = Recorder(graphs.source, [site.output for site in graphs.plan.sites])
        values.run(*graphs.inputs)
    for i, cache in caches.items():
        assert (cache - values.seen[graphs.plan.sites[i].output]).abs().max() < 1e-12
        assert not torch.equal(cache, before[i])
    for score in scores.values():
        assert torch.allclose(score.square().sum(1), torch.ones(BATCH, dtype=torch.float64))


def test_a_score_is_of_the_queries_that_the_policy_looks_at(graphs: Graphs) -> None:
    rules = [{"match": "mlp", "layers": 1, "scores": {"queries": 0.5}}]
    looking = with_policy(graphs, scores={"self_attention": 1.0, "queries": 0.25}, rules=rules)
    graph = looking.graph("full")
    caches, scores = buffers(looking.plan, graph)
    run(looking, graph, caches, scores)
    attentions = graphs.source.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    values = Recorder(
        graphs.source, [node.name for attention in attentions for node in attention.args[:2]]
    )
    with torch.no_grad():
        values.run(*graphs.inputs)
    for attention, score, every in zip(attentions, scores.values(), (5, 3, 5), strict=True):
        query, key = (values.seen[node.name] for node in attention.args[:2])
        weights = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1)
        assert (
            score - torch.nn.functional.normalize(weights[:, :, ::every].sum((1, 2)))
        ).abs().max() < 1e-12


def test_on_a_cpu_no_step_is_told_whether_its_scores_are_read(graphs: Graphs) -> None:
    full = graphs.step("full").modes
    assert READ not in rewrite(graphs.source, graphs.plan.step(full)).buffers


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__(module)
        self.names, self.seen = set(names), {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = value
        return value


# Partial steps


def test_operators_of_a_partial_step(graphs: Graphs, kind: str) -> None:
    graph = graphs.graph("partial")
    operators = count(graph.module.graph)
    assert operators[aten.linear.default] == LAYERS * BLOCK[kind] + REST[kind]
    assert (
        not operators[aten.scaled_dot_product_attention.default]
        + operators[aten._scaled_dot_product_flash_attention_for_cpu.default]
    )
    assert operators[aten.matmul.default] == count(graphs.source.graph)[aten.matmul.default]
    assert operators[aten.layer_norm.default] == LAYERS + 1  # those of the MLPs and of the output
    assert (
        operators[aten.copy_.default]
        == operators[aten.index_put.default]
        == operators[aten.index.Tensor]
        == LAYERS
    )
    assert {*graph.buffers} == {
        *(Buffer("cache", i) for i in range(2 * LAYERS)),
        *(Buffer(role, i) for role in ("order", "ranks") for i in (1, 3, 5)),
    }


def test_a_partial_step_drops_the_weights_that_it_does_not_need(graphs: Graphs, kind: str) -> None:
    kept = {
        graphs.source.graph.find_nodes(op="placeholder")[i].name
        for i in graphs.graph("partial").kept
    }
    dropped = {node.name for node in graphs.source.graph.find_nodes(op="placeholder")} - kept
    assert len(dropped) == LAYERS * ATTENTION[kind] * 2  # weights and biases


def test_the_gather_sits_on_the_residual_stream(graphs: Graphs) -> None:
    """x[rows] -> norm -> modulation -> MLP: everything after the residual add works on the fresh
    tokens.
    """
    graph = graphs.graph("partial").module.graph
    gathers = graph.find_nodes(op="call_function", target=aten.index.Tensor)
    for number, gather in enumerate(gathers):
        (rows,) = gather.args[1]
        assert rows.target is aten.index_select.default
        assert [operand.name for operand in rows.all_input_nodes] == [
            f"order_{2 * number + 1}",
            f"ranks_{2 * number + 1}",
        ]
        stream = behind_views(gather.args[0])
        assert stream.target is aten.add.Tensor
        # stream = x + gate * cache of this block's attention
        operands = [
            operand for operand in stream.all_input_nodes if operand.target is aten.mul.Tensor
        ]
        assert f"cache_{2 * number}" in {
            behind_views(factor).name for operand in operands for factor in operand.all_input_nodes
        }
        (norm,) = gather.users
        assert norm.target is aten.layer_norm.default


def test_each_mlp_is_scattered_once_and_written_once(graphs: Graphs) -> None:
    graph = graphs.graph("partial").module.graph
    for number, scatter in enumerate(
        graph.find_nodes(op="call_function", target=aten.index_put.default)
    ):
        assert behind_views(scatter.args[0]).name == f"cache_{2 * number + 1}"
        assert [rows.args[0].name for rows in scatter.args[1]] == [f"order_{2 * number + 1}"]
    writes = [node for node in graph.nodes if node.target is aten.copy_.default]
    assert [node.args[0].name for node in writes] == [f"cache_{i}" for i in (1, 3, 5)]
    end = next(iter(graph.find_nodes(op="output")))
    nodes = list(graph.nodes)
    assert nodes[nodes.index(end) - len(writes) : nodes.index(end)] == writes, "the writes trail"


def test_all_tokens_fresh_recompute_the_caches(graphs: Graphs) -> None:
    """With the caches of a full step and all rows, a partial step is the model."""
    full, partial = graphs.graph("full"), graphs.graph("partial")
    caches, scores = buffers(graphs.plan, full)
    expected = run(graphs, full, caches, scores)
    for i in sites_with(partial, "order"):
        caches[i].fill_(7.0)
    outputs = run(graphs, partial, caches, {}, [all_rows()] * LAYERS)
    for output, other in zip(outputs, expected, strict=True):
        assert (output - other).abs().max() < 1e-12


@pytest.mark.parametrize("fresh", [0, 1, 5])
def test_only_the_fresh_rows_change(graphs: Graphs, fresh: int) -> None:
    graph = graphs.graph("partial")
    caches, _ = buffers(graphs.plan, graph)
    before = {i: cache.clone() for i, cache in caches.items()}
    rows = all_rows()[:, [9, 3, 60, 0, 31][:fresh]]
    run(graphs, graph, caches, {}, [rows] * LAYERS)
    for i, cache in caches.items():
        changed = (cache != before[i]).flatten(0, 1).any(dim=1).nonzero().flatten().tolist()
        assert changed == (
            sorted(rows.flatten().tolist()) if i in sites_with(graph, "order") else []
        )


def test_fresh_nodes_are_the_mlp_on_the_fresh_tokens(graphs: Graphs) -> None:
    graph = graphs.graph("partial")
    nodes = {node.name: node for node in graph.module.graph.nodes}
    assert graph.fresh_nodes.keys() == set(sites_with(graph, "order"))
    for names in graph.fresh_nodes.values():
        targets = Counter(nodes[name].target for name in names)
        assert (
            targets[aten.linear.default],
            targets[aten.layer_norm.default],
            targets[aten.gelu.default],
        ) == (2, 1, 1)


# Other modes


def test_reused_mlps_fall_away(graphs: Graphs, kind: str) -> None:
    graph = with_policy(graphs, modules={"mlp": "reuse"}).graph("partial")
    operators = count(graph.module.graph)
    assert operators[aten.linear.default] == LAYERS * (BLOCK[kind] - 2) + REST[kind]
    assert operators[aten.layer_norm.default] == 1
    assert (
        not operators[aten.copy_.default]
        + operators[aten.index_put.default]
        + operators[aten.index.Tensor]
    )


def test_computed_attention_stays(graphs: Graphs) -> None:
    graph = with_policy(graphs, modules={"self_attention": "compute"}).graph("partial")
    operators = count(graph.module.graph)
    assert operators[aten.linear.default] == count(graphs.source.graph)[aten.linear.default]
    assert operators[aten.scaled_dot_product_attention.default] == LAYERS
    assert sites_with(graph, "cache") == sites_with(graph, "order") == (1, 3, 5)


def test_a_mixed_step(graphs: Graphs) -> None:
    mixed = with_policy(graphs, rules=[{"layers": 0, "N": {"extra_full_steps": [2]}}])
    graph = mixed.graph("mixed")
    operators = count(graph.module.graph)
    assert mixed.step("mixed").modes == ("full", "full", "reuse", "partial", "reuse", "partial")
    assert operators[aten.index_put.default] == 2
    assert (
        operators[aten.copy_.default] == 2 + 1 + 2
    )  # caches of the first block, its score, two MLPs
    assert sites_with(graph, "score") == (1,)


def test_a_graph_without_sites_to_cache_is_the_source(graphs: Graphs) -> None:
    plan = make_plan(match(graphs.source.graph), make_policy(N={"base": 1}))
    graph = rewrite(graphs.source, plan.step(plan.full_modes))
    assert count(graph.module.graph) == count(graphs.source.graph)
    assert graph.kept == tuple(range(len(graphs.inputs)))
    assert graph.buffers == ()
