"""Changes of a graph that are right for any graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

from torch import fx

from toca_fx.graph.ops import WORK
from toca_fx.torch_private import is_mutable


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


def put_value(node: fx.Node, value: Any) -> None:
    """Let the users of ``node`` have ``value``, a number or a list of such, in its place."""

    def known(operand: fx.Node) -> Any:
        return value if operand is node else operand

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, known)
        user.kwargs = fx.node.map_arg(user.kwargs, known)


def is_check(node: fx.Node) -> bool:
    """Whether a node only raises an error if its operands are not what the model expects."""
    name = getattr(node.target, "__name__", "")
    return bool(name.startswith(("_assert", "sym_constrain_range")))


def checks(graph: fx.Graph, needed: Set[fx.Node]) -> list[fx.Node]:
    """The checks of ``graph`` that cost next to nothing, if ``needed`` are computed anyway.

    A check of what a module puts out goes with the module where that is reused.
    """
    found = filter(is_check, graph.nodes)
    return [
        node
        for node in found
        if not any(operand.target in WORK for operand in ancestors([node], stop=needed) - needed)
    ]


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Erase what neither an output nor a write needs, nor a check of what these need.

    FX itself keeps seeded operators alive, attention among them for its optional dropout.
    """
    needed = ancestors(node for node in graph.nodes if _has_effect(node))
    kept = set(checks(graph, needed))
    graph.eliminate_dead_code(is_impure_node=lambda node: _has_effect(node) or node in kept)


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


def used_inputs(graph: fx.Graph) -> tuple[int, ...]:
    """The positions of the inputs that something in the graph uses."""
    placeholders = graph.find_nodes(op="placeholder")
    return tuple(at for at, node in enumerate(placeholders) if node.users)
