"""Step graphs cut between blocks: what is cut computes what the whole did, and equal blocks are
compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import analysis_of, capture, make_policy
from tests.marks import slow_but
from toca_fx.examples import build, examples
from toca_fx.lower import blocks as regions
from toca_fx.lower.analysis import Analysis
from toca_fx.lower.fake_inputs import FakeInputs
from toca_fx.rewrite.step_graph import StepGraph
from toca_fx.rewrite.tensors import Tensors

MODELS = slow_but(
    ["DiTTransformer2DModel", "FluxTransformer2DModel"],
    [
        "DiTTransformer2DModel",
        "PixArtTransformer2DModel",
        "FluxTransformer2DModel",
        "SD3Transformer2DModel",
        "LatteTransformer3DModel",
    ],
    "of the classes, one stream and two are enough",
)


@cache
def analysed(name: str) -> tuple[Analysis, list[Any]]:
    model, call = build(examples()[name])
    captured, inputs = capture(model, **call)
    return analysis_of(
        captured, inputs, make_policy(scores={"self_attention": 1.0, "cross_attention": 0.5})
    ), inputs


def step_of(found: Analysis, kind: str) -> StepGraph:
    plan = found.plan(None)
    return found.step_graph(plan, next(step.modes for step in plan.steps if step.kind == kind))


def tensors_of(found: Analysis, step: StepGraph) -> list[Tensor]:
    """Random caches, three fresh tokens of each sample, and hoisted values."""
    generator = torch.Generator().manual_seed(0)
    plan = found.plan(None)
    made = Tensors(found.aten, plan)
    tensors = [made.example(buffer, 3) for buffer in step.buffers]
    for buffer, tensor in zip(step.buffers, tensors, strict=True):
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
        elif buffer.role == "order":
            tokens = plan.sites[buffer.site].tokens
            first = torch.arange(tensor.shape[0])[:, None] * tokens
            tensor.copy_(first + torch.randperm(tokens, generator=generator))
        elif buffer.role == "ranks":
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
        buffer
        for buffer, before, after in zip(step.buffers, tensors, whole[-len(tensors) :], strict=True)
        if not torch.equal(before, after)
    ]
    assert any(buffer.role == "cache" for buffer in changed)


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


def test_symbols_are_told_apart_by_their_place() -> None:
    found, _ = analysed("DiTTransformer2DModel")
    step = step_of(found, "partial")
    fake = FakeInputs(step, found.aten, found.plan(None))
    compiled: list[int] = []

    def inner(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    regions.compile_regions(step.module, [*fake.symbolic({}).inputs], inner, fake.mode)
    assert isinstance(fake.mode, FakeTensorMode)
    assert len(compiled) == 3, "two blocks with a K of their own"


def test_a_graph_that_computes_nothing_is_one_piece() -> None:
    """Such are parts of models that Dynamo captures in several graphs."""
    graph = fx.Graph()
    given = graph.placeholder("given")
    graph.output((given, graph.get_attr("kept")))
    module = fx.GraphModule({"kept": torch.ones(2)}, graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    example = mode.from_tensor(torch.zeros(3))
    run = regions.compile_regions(module, [example], lambda graph, _: graph, mode)
    assert [len(value) for value in run(torch.zeros(3))] == [3, 2]
