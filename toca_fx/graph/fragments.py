"""Functions of tensors as nodes of a graph; those that are equal are traced once and copied."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from toca_fx.graph.autocast import OFF
from toca_fx.torch_private import trace


class Fragments:
    """Puts what functions compute into ``graph``, in pre-dispatch ATen.

    Every block has its scores computed by the same functions on operands of the same layout, and a
    trace costs a hundred times what a copy does.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
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
            self._traced[key] = _trace(function, given, nodes)
        return self._traced[key]


def _nodes_in(given: Any) -> list[fx.Node]:
    """The nodes in arguments, one that comes twice twice."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(given, nodes.append)
    return nodes


def _trace(
    function: Callable[..., Any], given: tuple[Any, Any], nodes: Sequence[fx.Node]
) -> fx.Graph:
    """The graph of ``function`` over the fake values of ``nodes``, which occur in ``given``."""

    def on_values(*values: Any) -> Any:
        by_node = dict(zip(nodes, values, strict=True))
        args, kwargs = fx.node.map_arg(given, by_node.__getitem__)
        return function(*args, **kwargs)

    # The tracer knows tensors by identity, and nodes may share one fake value.
    values = [node.meta["val"].detach() for node in nodes]
    with OFF.again():
        return trace(on_values, values).graph


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
