"""Step graphs cut between blocks: what is cut computes what the whole did, and equal blocks are
compiled once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import toca_fx
from tests.helpers import capture, make_inputs, make_policy, run_all, text_inputs, tiny
from toca_fx.examples import build, examples
from toca_fx.graph.ops import aten
from toca_fx.lower import blocks as regions
from toca_fx.lower.cost import Analysis, CountedStep
from toca_fx.plan.buffers import Buffers, given
from toca_fx.rewrite.step import StepGraph

MODELS = [
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "LatteTransformer3DModel",
]


class Compiled:
    """The inner backend "eager", which keeps the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


@cache
def analysed(name: str) -> tuple[Analysis, list[Any]]:
    model, call = build(examples()[name])
    captured, inputs = capture(model, **call)
    return Analysis(
        captured, inputs, make_policy(scores={"self_attention": 1.0, "cross_attention": 0.5})
    ), inputs


def step_of(found: Analysis, kind: str) -> StepGraph:
    plan = found.plan(None)
    return found.step_graph(plan, next(step.modes for step in plan.steps if step.kind == kind))


def tensors_of(found: Analysis, step: StepGraph) -> list[Tensor]:
    """Random caches, three fresh tokens of each sample, and hoisted values."""
    generator = torch.Generator().manual_seed(0)
    plan = found.plan(None)
    made, of_step = Buffers(found.aten, plan), given(plan, step.modes)
    tensors = [made.example(name, 3) if name in of_step else made.new(name) for name in step.names]
    for name, tensor in zip(step.names, tensors, strict=True):
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
        elif name.startswith("rows"):
            tokens = plan.sites[int(name.split(":")[1])].tokens
            tensor.copy_(
                torch.arange(tensor.shape[0])[:, None] * tokens
                + torch.randperm(tokens, generator=generator)[:3]
            )
        elif name.startswith("ranks"):
            tensor.copy_(torch.arange(3))
    return tensors


def flat(outputs: Any) -> list[Tensor]:
    return [
        value for value in torch.utils._pytree.tree_leaves(outputs) if isinstance(value, Tensor)
    ]


@pytest.mark.parametrize("kind", ["full", "partial"])
@pytest.mark.parametrize("name", MODELS)
def test_the_pieces_compute_what_the_whole_does(name: str, kind: str) -> None:
    found, inputs = analysed(name)
    step = step_of(found, kind)
    tensors = tensors_of(found, step)
    results = []
    for module in (step.module, regions.cut(step.module)):
        copies = [tensor.clone() for tensor in tensors]
        with torch.no_grad():
            outputs = module(*(inputs[position] for position in step.kept), *copies)
        results.append([*flat(outputs), *copies])
    whole, pieces = results
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    changed = [
        name
        for name, before, after in zip(step.names, tensors, whole[-len(tensors) :], strict=True)
        if not torch.equal(before, after)
    ]
    assert any(name.startswith("cache") for name in changed)


@pytest.mark.parametrize("kind", ["full", "partial"])
@pytest.mark.parametrize("name", MODELS)
def test_one_tensor_per_stream_crosses_a_cut(name: str, kind: str) -> None:
    found, _ = analysed(name)
    pieces = regions.cut(step_of(found, kind).module)
    outputs = [
        len(next(iter(piece.graph.find_nodes(op="output"))).all_input_nodes)
        for _, piece in pieces.named_children()
    ]
    assert all(1 <= count <= 2 for count in outputs[1:]), "image and text"


@pytest.mark.parametrize("kind", ["diffusers", "original", "cross", "joint"])
def test_the_number_of_compilations_does_not_depend_on_the_number_of_blocks(kind: str) -> None:
    counts, steps = [], []
    for layers in (3, 5):
        inner, model = Compiled(), tiny(kind, layers=layers)
        inputs = text_inputs() if kind in ("cross", "joint") else make_inputs(dtype=torch.float64)
        fast = toca_fx.compile(model.double(), make_policy(), inner=inner)
        with toca_fx.session() as run:
            run_all(fast, inputs)
        counts.append(len(inner.graphs))
        steps.append(run.report().compiled_graphs)
    assert steps == [2, 2]
    # Before, block, after; the first block may get another layout, the last may have dead ends.
    assert counts[0] == counts[1] <= 2 * 5 + 1


def test_attention_is_compiled_once_for_all_blocks() -> None:
    inner, model = Compiled(), tiny("diffusers", layers=4)
    with toca_fx.session():
        run_all(
            toca_fx.compile(model, make_policy(scores={"random": 1.0}), inner=inner), make_inputs()
        )
    targets = Counter(node.target for graph in inner.graphs for node in graph.graph.nodes)
    assert targets[aten.scaled_dot_product_attention.default] == 1


def test_a_block_that_does_something_else_is_compiled_by_itself() -> None:
    def compiled(**sections: Any) -> int:
        inner = Compiled()
        with toca_fx.session():
            run_all(
                toca_fx.compile(tiny("diffusers", layers=5), make_policy(**sections), inner=inner),
                make_inputs(),
            )
        return len(inner.graphs)

    assert compiled(rules=[{"layers": 2, "match": "mlp", "module": "reuse"}]) > compiled()


def test_without_equal_blocks_the_graph_stays_whole() -> None:
    inner = Compiled()
    with toca_fx.session():
        run_all(
            toca_fx.compile(
                tiny("diffusers", layers=1), make_policy(hoisting={"memory": 0}), inner=inner
            ),
            make_inputs(steps=1),
        )
    assert len(inner.graphs) == 1


def test_what_is_computed_decides_and_not_where() -> None:
    def piece(scale: float) -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(aten.mul.Tensor, (x, scale)),))
        return fx.GraphModule({}, graph)

    x = torch.empty(2, 3)
    same = regions.signature(piece(2.0), [x])
    assert regions.signature(piece(2.0), [x.clone()]) == same
    assert hash(regions.signature(piece(2.0), [x])) == hash(same)
    for other in (
        (piece(3.0), [x]),
        (piece(2.0), [x.double()]),
        (piece(2.0), [torch.empty(3, 2).T]),
        (piece(2.0), [torch.empty(2, 4)]),
    ):
        module, inputs = other if isinstance(other[0], fx.GraphModule) else (piece(2.0), other[1])
        assert regions.signature(module, list(inputs)) != same


def test_writes_come_behind_all_that_read_the_memory() -> None:
    """A later block reads a buffer that an earlier one writes to: the write moves to the reader's
    piece.
    """
    graph = fx.Graph()
    x, buffer = graph.placeholder("x"), graph.placeholder("buffer")

    def add(block: int, left: fx.Node, right: fx.Node) -> fx.Node:
        node = graph.call_function(aten.add.Tensor, (left, right))
        node.meta.update(path=f"blocks.{block}", stack=(f"blocks.{block}",))
        return node

    first = add(0, x, x)
    second = add(1, first, buffer)
    graph.call_function(aten.copy_.default, (buffer, first))
    graph.output((second,))
    module = fx.GraphModule({}, graph)
    region = {
        node.target: number
        for node, number in regions.assign(graph).items()
        if node.target is aten.copy_.default
    }
    assert region == {aten.copy_.default: 3}
    pieces = regions.cut(module)
    held = torch.ones(2)
    (found,) = pieces(torch.full((2,), 3.0), held)
    assert found.tolist() == [7, 7]
    assert held.tolist() == [6, 6]


def test_symbols_are_told_apart_by_their_place() -> None:
    found, _ = analysed("DiTTransformer2DModel")
    step = step_of(found, "partial")
    counted = CountedStep(step, found.aten, found.plan(None))
    compiled: list[int] = []

    def inner(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    regions.compile_regions(step.module, counted._examples(counted._symbol), inner, counted._mode)
    assert isinstance(counted._mode, FakeTensorMode)
    assert len(compiled) == 3, "two blocks with a K of their own"
