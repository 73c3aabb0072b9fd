"""Which weights the steps of a plan read, and in which order, where they are away between calls."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import fx

from toca_fx.lower.analysis import Analysis
from toca_fx.lower.blocks import cut
from toca_fx.plan.plan import Plan
from toca_fx.plan.schedule import Modes
from toca_fx.rewrite.step_graph import StepGraph
from toca_fx.torch_private import compiling

Read = tuple[int, ...]
"""Positions of the inputs that are asked for at one time."""


def reads(found: Analysis, plan: Plan) -> Iterator[list[Read]]:
    """What each call of a run asks for, in order; the run is told its timesteps.

    Values that do not depend on the latents are made in the first call, of one weight after the
    other; a step is run piece by piece.
    """
    pieces: dict[Modes, list[Read]] = {}
    listed = found.table_fits(len(plan.steps))
    for number, step in enumerate(plan.fewest):
        graph = found.costs(plan)[step.modes].graph
        wanted, asked = found.wanted(graph), list[Read]()
        if not number and wanted.conditions:
            asked += _by_node(found.conditions)
        if not listed:
            asked += _by_node(wanted.part)
        elif not number:
            asked += _by_node(found.timed)
        if step.modes not in pieces:
            pieces[step.modes] = _by_piece(graph)
        yield asked + pieces[step.modes]


def _by_node(part: StepGraph) -> list[Read]:
    graph = part.module.graph
    return _reads(part, graph, [node for node in graph.nodes if node.op == "call_function"])


def _by_piece(step: StepGraph) -> list[Read]:
    with compiling():
        pieces = cut(fx.GraphModule(step.module, copy.deepcopy(step.module.graph)))
    return _reads(step, pieces.graph, pieces.graph.find_nodes(op="call_module"))


def _reads(part: StepGraph, graph: fx.Graph, nodes: list[fx.Node]) -> list[Read]:
    placeholders = graph.find_nodes(op="placeholder")
    position = dict(zip(placeholders, part.kept, strict=False))
    read = (
        tuple(position[operand] for operand in node.all_input_nodes if operand in position)
        for node in nodes
    )
    return [each for each in read if each]
