"""Graphs that are cut out of the model's: step graphs, and those that compute hoisted values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from toca_fx.graph.edit import ancestors, checks
from toca_fx.graph.ops import aten
from toca_fx.plan.buffers import Buffer, hoisted
from toca_fx.rewrite.report import PassReport


@dataclass(frozen=True)
class StepGraph:
    """A graph cut out of the model's, and how to call it.

    Inputs, in order: the model's inputs at positions ``kept``, then the tensors of ``buffers``.
    ``fresh_nodes[i]`` names the nodes that work on the fresh tokens of site i only (for counting
    FLOPs); ``reports`` say what each pass did.
    """

    module: fx.GraphModule
    kept: tuple[int, ...]
    buffers: tuple[Buffer, ...]
    fresh_nodes: Mapping[int, frozenset[str]] = field(default_factory=dict)
    reports: tuple[PassReport, ...] = ()

    @cached_property
    def hoisted(self) -> frozenset[str]:
        """The names of the hoisted values that it reads."""
        return frozenset(str(each.part) for each in self.buffers if each.role == "hoisted")


def extract(
    source: fx.GraphModule,
    names: Sequence[str],
    given: Collection[str] = (),
    *,
    checked: bool = False,
) -> StepGraph:
    """The part of ``source`` that computes the nodes ``names``; it returns contiguous values.

    The values of the nodes ``given`` are inputs. ``checked`` keeps what the model checks of the
    values in it. ``source`` is not changed.
    """
    nodes = {node.name: node for node in source.graph.nodes}
    ends = [nodes[name] for name in given]
    found = ancestors((nodes[name] for name in names), ends)
    for check in checks(source.graph, found) if checked else ():
        more = ancestors([check], stop=found) - found
        if all(node.op != "placeholder" for node in more):
            found |= more
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    kept: list[int] = []
    for at, node in enumerate(source.graph.find_nodes(op="placeholder")):
        if node in found:
            kept.append(at)
            copies[node] = graph.node_copy(node)
    used = tuple(name for name in given if nodes[name] in found)
    for name in used:
        copies[nodes[name]] = graph.placeholder(hoisted(name).name)
        copies[nodes[name]].meta["val"] = nodes[name].meta["val"]
    for node in source.graph.nodes:
        if node in found and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    values = [
        graph.call_function(aten.contiguous.default, (copies[nodes[name]],)) for name in names
    ]
    graph.output(tuple(values))
    graph.lint()
    return StepGraph(fx.GraphModule(source, graph), tuple(kept), tuple(map(hoisted, used)))
