"""Functions of tensors as nodes of a graph; those that are equal are traced once and copied."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from toca_fx.graph.autocast import OFF
from toca_fx.torch_private import OpOverload, trace

Decompositions = Mapping[OpOverload, Callable[..., Any]]


class Fragments:
    """Puts what functions compute into ``graph``, in pre-dispatch ATen.

    Every block has its scores computed by the same functions on operands of the same layout, and a
    trace costs a hundred times what a copy does. Operators of ``decompositions`` are taken apart.
    """

    def __init__(self, graph: fx.Graph, decompositions: Decompositions | None = None) -> None:
        self._graph, self._decompositions = graph, decompositions
        self._traced: dict[tuple[object, str], fx.Graph] = {}

    def inline(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Trace ``function`` over the fake values of nodes, and copy it to the insertion point.

        Nodes in ``args`` and ``kwargs`` stand for their values. Returns the output nodes.
        ``function`` is one of a module, or a ``functools.partial`` of one with hashable arguments:
        two are the same if they are equal.
        """
        traced = self.traced(function, args, kwargs)
        inputs, nodes = traced.find_nodes(op="placeholder"), _nodes_in((args, kwargs or {}))
        return self._graph.graph_copy(traced, dict(zip(inputs, nodes, strict=True)))

    def replace(self, node: fx.Node, function: Callable[..., Any]) -> list[fx.Node]:
        """Put what ``function`` makes of the operands of ``node`` in its place.

        Returns the new nodes, in order; they say what ``node`` said of where it comes from.
        """
        before = node.prev
        with self._graph.inserting_before(node):
            results = self.inline(function, node.args, node.kwargs)
        parts = []
        while before.next is not node:
            before = before.next
            before.meta = {**node.meta, "val": before.meta["val"]}
            parts.append(before)
        if isinstance(results, fx.Node):
            node.replace_all_uses_with(results)
        for item in list(node.users):  # of an operator that returns several tensors
            at: Any = item.args[1]
            item.replace_all_uses_with(results[at])
            self._graph.erase_node(item)
        self._graph.erase_node(node)
        return parts

    def traced(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
    ) -> fx.Graph:
        """What ``inline`` copies: a graph with a placeholder for each node, in order."""
        given = (tuple(args), dict(kwargs or {}))
        nodes = _nodes_in(given)
        key = (_identity(function), repr(fx.node.map_arg(given, _namer(nodes))))
        if key not in self._traced:
            self._traced[key] = _trace(function, given, nodes, self._decompositions)
        return self._traced[key]


def _nodes_in(given: Any) -> list[fx.Node]:
    """The nodes in arguments, one that comes twice twice."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(given, nodes.append)
    return nodes


def _trace(
    function: Callable[..., Any],
    given: tuple[Any, Any],
    nodes: Sequence[fx.Node],
    decompositions: Decompositions | None,
) -> fx.Graph:
    """The graph of ``function`` over the fake values of ``nodes``, which occur in ``given``."""

    def on_values(*values: Any) -> Any:
        by_node = dict(zip(nodes, values, strict=True))
        args, kwargs = fx.node.map_arg(given, by_node.__getitem__)
        return function(*args, **kwargs)

    # The tracer knows tensors by identity, and nodes may share one fake value.
    values = [node.meta["val"].detach() for node in nodes]
    with OFF.again():
        return trace(on_values, values, decompositions).graph


def _identity(function: object) -> object:
    """What tells a function from others, hashable: partial objects compare by identity."""
    if not isinstance(function, functools.partial):
        return function
    named = tuple((key, _identity(value)) for key, value in sorted(function.keywords.items()))
    return function.func, tuple(map(_identity, function.args)), named


def _namer(nodes: Sequence[fx.Node]) -> Callable[[fx.Node], str]:
    """A function that names an operand: which of ``nodes`` it is, and how its value lies."""

    def name(node: fx.Node) -> str:
        value: Tensor = node.meta["val"]
        layout = (value.dtype, value.device, value.shape, value.stride())
        return f"%{nodes.index(node)}: {layout}"

    return name
