"""Pieces of hand-made graphs: which are equal, and where writes go."""

from __future__ import annotations

import torch
from torch import fx

from toca_fx.graph.ops import aten
from toca_fx.lower import blocks as regions


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
