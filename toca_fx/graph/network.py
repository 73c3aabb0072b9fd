"""A graph as networkx has it, for questions that are asked once.

It takes 0.05 s for the 6578 nodes of FLUX.1-dev. Questions that are asked for every site have code
of their own in ``stream.py``, with figures.
"""

from __future__ import annotations

from collections.abc import Collection

import networkx as nx
from torch import fx


def network(graph: fx.Graph) -> nx.DiGraph:
    """The names of all nodes, with an edge from each to those that read it."""
    found = nx.DiGraph()
    for node in graph.nodes:
        found.add_node(node.name)
        found.add_edges_from((operand.name, node.name) for operand in node.all_input_nodes)
    return found


def needed(graph: fx.Graph, names: Collection[str], given: Collection[str] = ()) -> set[str]:
    """The nodes ``names`` and all that they depend on if the nodes ``given`` are there already."""
    left = network(graph)
    left.remove_nodes_from(given)
    return set(names).union(*(nx.ancestors(left, name) for name in names)) - set(given)
