"""Functions as nodes of a graph: they compute the same, and equal ones are traced once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from toca_fx.graph.fragments import Fragments

aten = torch.ops.aten


class Traced:
    """A function that counts how often it is run."""

    def __init__(self, scale: float) -> None:
        self.scale, self.times = scale, 0

    def __call__(self, x: Tensor, y: Tensor, *, also: Tensor | None = None) -> tuple[Tensor, ...]:
        self.times += 1
        z = x * self.scale + y
        return (z, z if also is None else also * z)


def scaled(x: Tensor, scale: float, seen: Callable[[Tensor], Tensor]) -> Tensor:
    return seen(x) * scale


class Graph:
    """A graph of two inputs of each shape, and its fragments."""

    def __init__(self, *shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.graph = fx.Graph()
        self.nodes = [self.graph.placeholder(f"x{at}") for at in range(2 * len(shapes))]
        for at, node in enumerate(self.nodes):
            node.meta["val"] = torch.empty(shapes[at // 2], dtype=dtype, device="meta")
        self.fragments = Fragments(self.graph)

    def run(self, outputs: Any, *inputs: Tensor) -> Any:
        self.graph.output(outputs)
        self.graph.lint()
        return fx.GraphModule(nn.Module(), self.graph)(*inputs)


def test_copies_compute_what_the_function_does() -> None:
    built, function = Graph((2, 3), (2, 3)), Traced(2.0)
    a, b, c, d = built.nodes
    first, _ = built.fragments.inline(function, (a, b))
    _, second = built.fragments.inline(function, (first, c), {"also": d})
    _, third = built.fragments.inline(function, (second, a), {"also": b})
    inputs = torch.randn(4, 2, 3).unbind()
    expected = function(*inputs[:2])[0]
    expected = function(expected, inputs[2], also=inputs[3])[1]
    expected = function(expected, inputs[0], also=inputs[1])[1]
    torch.testing.assert_close(built.run(third, *inputs), expected)
    assert all(node.meta["val"].shape == (2, 3) for node in (first, second, third))


def test_equal_calls_are_traced_once() -> None:
    built, function = Graph((2, 3), (2, 3)), Traced(2.0)
    a, b, c, d = built.nodes
    for left, right in ((a, b), (c, d), (b, a)):
        built.fragments.inline(function, (left, right))
    assert function.times == 1
    assert len(built.graph.find_nodes(op="call_function", target=aten.mul.Tensor)) == 3


@pytest.mark.parametrize("other", ["shape", "same operand", "operand more"])
def test_other_calls_are_traced_again(other: str) -> None:
    built, function = Graph((2, 3), (4, 3)), Traced(2.0)
    a, b, c, d = built.nodes
    built.fragments.inline(function, (a, b))
    if other == "shape":
        built.fragments.inline(function, (c, d))
    elif other == "same operand":
        built.fragments.inline(function, (a, a))
    else:
        built.fragments.inline(function, (a, b), {"also": b})
    assert function.times == 2


def test_partial_functions_are_equal_by_what_they_hold() -> None:
    built = Graph((2, 3))
    a, b = built.nodes
    seen: list[torch.Size] = []

    def see(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x

    nodes = [
        built.fragments.inline(functools.partial(scaled, scale=scale, seen=see), (node,))
        for scale, node in ((1.0, a), (1.0, b), (3.0, a))
    ]
    assert len(seen) == 2
    assert [node.args[1] for node in nodes] == [1.0, 1.0, 3.0]
