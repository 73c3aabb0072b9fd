"""Changes of a graph that are right for any graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx

from toca_fx.torch_private import is_mutable, make_fx


def inline(graph: fx.Graph, function: Callable[..., Any], args: Any, kwargs: Any = None) -> Any:
    """Trace ``function`` over the fake values of nodes, and copy it to the insertion point.

    Nodes in ``args`` and ``kwargs`` stand for their values. Returns the output nodes.
    """
    nodes: list[fx.Node] = []
    fx.node.map_arg((args, kwargs or {}), nodes.append)

    def on_values(*values: Any) -> Any:
        by_node = dict(zip(nodes, values, strict=True))
        args_, kwargs_ = fx.node.map_arg((args, kwargs or {}), by_node.__getitem__)
        return function(*args_, **kwargs_)

    # The tracer knows tensors by identity, and nodes may share one fake value.
    values = [node.meta["val"].detach() for node in nodes]
    traced = make_fx(on_values, tracing_mode="fake", pre_dispatch=True)(*values)
    inputs = traced.graph.find_nodes(op="placeholder")
    return graph.graph_copy(traced.graph, dict(zip(inputs, nodes, strict=True)))


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """``nodes`` and all that they depend on, up to and with the nodes of ``stop``."""
    ends = set(stop)
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node not in ends:
                pending.extend(node.all_input_nodes)
    return found


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Erase what neither an output nor a write needs.

    FX itself keeps seeded operators alive, attention among them for its optional dropout.
    """
    graph.eliminate_dead_code(is_impure_node=_has_effect)


def _has_effect(node: fx.Node) -> bool:
    """Whether a node without users has to stay: inputs, outputs and writes do."""
    if node.op in ("placeholder", "output"):
        return True
    return is_mutable(node.target)


def erase_unused(graph: fx.Graph, placeholders: Sequence[fx.Node]) -> tuple[int, ...]:
    """Erase the placeholders without users; returns the positions of those that are left."""
    used = tuple(position for position, node in enumerate(placeholders) if node.users)
    for node in placeholders:
        if not node.users:
            graph.erase_node(node)
    return used
