"""What is asked of networkx."""

from __future__ import annotations

import operator

import networkx as nx
from torch import fx

from toca_fx.graph.network import needed, network


def diamond() -> fx.Graph:
    """x and y -> left and right -> both -> the output; nobody reads ``alone``."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    left, right = graph.call_function(operator.neg, (x,)), graph.call_function(operator.pos, (y,))
    graph.call_function(operator.abs, (x,))
    both = graph.call_function(operator.add, (left, right))
    graph.output(both)
    return graph


def test_a_graph_is_a_network_of_its_nodes() -> None:
    graph = diamond()
    found = network(graph)
    assert list(found) == [node.name for node in graph.nodes]
    assert nx.is_directed_acyclic_graph(found)
    assert set(found.predecessors("add")) == {"neg", "pos"}


def test_what_is_needed() -> None:
    graph = diamond()
    assert needed(graph, ["output"]) == {"output", "add", "neg", "pos", "x", "y"}
    assert needed(graph, ["output"], given=["neg"]) == {"output", "add", "pos", "y"}
    assert needed(graph, ["neg", "pos"]) == {"neg", "pos", "x", "y"}
    assert needed(graph, [], given=["add"]) == set()
