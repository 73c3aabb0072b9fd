"""Changes of a graph that are right for any graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

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
