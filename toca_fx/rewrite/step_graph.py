"""Graphs that are cut out of the model's: step graphs, and those that compute hoisted values."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from toca_fx.graph.edit import eliminate_dead_code, erase_unused
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


def extract(source: fx.GraphModule, names: Sequence[str], given: Collection[str] = ()) -> StepGraph:
    """The part of ``source`` that computes the nodes ``names``; it returns contiguous values.

    The values of the nodes ``given`` are inputs. ``source`` is not changed.
    """
    graph = copy.deepcopy(source.graph)
    nodes = {node.name: node for node in graph.nodes}
    inputs = graph.find_nodes(op="placeholder")
    buffers: dict[Buffer, fx.Node] = {}
    last = inputs[-1]
    for name in given:
        with graph.inserting_after(last):
            last = buffers[hoisted(name)] = graph.placeholder(hoisted(name).name)
        last.meta["val"] = nodes[name].meta["val"]
        nodes[name].replace_all_uses_with(last)
    (end,) = graph.find_nodes(op="output")
    with graph.inserting_before(end):
        values = [graph.call_function(aten.contiguous.default, (nodes[name],)) for name in names]
        end.args = (tuple(values),)
    eliminate_dead_code(graph)
    used = tuple(buffer for buffer, node in buffers.items() if node.users)
    kept = erase_unused(graph, inputs)
    erase_unused(graph, list(buffers.values()))
    graph.lint()
    return StepGraph(fx.GraphModule(source, graph), kept, used)
