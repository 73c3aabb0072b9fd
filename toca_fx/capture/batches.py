"""Regions of torch.vmap -> operators on tensors that have the batch as an axis.

Masks of positions are made in such regions (flex_attention's block masks, those of transformers).
A tracer in front of the dispatcher meets batched tensors, which are none that a graph can have.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from toca_fx.capture.casts import autocast_of
from toca_fx.capture.interpret import Interpreter
from toca_fx.graph.autocast import Autocast
from toca_fx.torch_private import (
    batches_ended,
    detect_fake_mode,
    trace,
    vmap_begin,
    vmap_end,
    vmap_prepare,
)


def batched(captured: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    """Dynamo's graph without regions of torch.vmap, for inputs like ``fakes``.

    ``fakes`` are fake tensors of one mode, or numbers. It is ``captured`` itself if it has no such
    regions, else a copy.
    """
    mode = detect_fake_mode(fakes)
    if mode is None or not captured.graph.find_nodes(op="call_function", target=vmap_begin):
        return captured
    module = fx.GraphModule(captured, copy.deepcopy(captured.graph))
    module.meta = captured.meta
    now = Autocast.now()
    states = autocast_of(module.graph, lambda _: now)
    running = Interpreter(module, states, keeps_values=True)
    with mode, torch.no_grad(), batches_ended():
        running.run(*fakes)
    for region in list(_regions(module.graph)):
        _replace(region, module, running.env, states[region[0]])
    for node in module.graph.find_nodes(op="call_function", target=vmap_prepare):
        module.graph.erase_node(node)
    module.recompile()
    return module


def _regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The outermost regions of a graph: the nodes from where each begins to where it ends."""
    region: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        depth += node.target is vmap_begin
        if depth:
            region.append(node)
        depth -= node.target is vmap_end
        if region and not depth:
            yield region
            region = []


def _replace(
    region: Sequence[fx.Node], owner: fx.GraphModule, values: dict[fx.Node, Any], state: Autocast
) -> None:
    """Put what ``region`` computes in its place."""
    inside = set(region)
    read = dict.fromkeys(
        operand
        for node in region
        for operand in node.all_input_nodes
        if operand not in inside and operand.op != "get_attr"
    )
    returned = [node for node in region if any(user not in inside for user in node.users)]
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for operand in read:
        copies[operand] = graph.placeholder(operand.name)
    for node in region:
        for operand in node.all_input_nodes:
            if operand not in copies:
                copies[operand] = graph.node_copy(operand)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in returned])
    given = [values[operand] for operand in read]
    with state.again(), batches_ended():
        in_place = trace(fx.GraphModule(owner, graph), given, pre_dispatch=False)
    # The regions say their own depth: nothing may be around them.
    traced = trace(torch.func.functionalize(in_place), given, pre_dispatch=False)
    inputs = dict(zip(traced.graph.find_nodes(op="placeholder"), read, strict=True))
    for node in traced.graph.find_nodes(op="get_attr"):
        name = f"{region[0].name}_{node.target}"
        setattr(owner, name, getattr(traced, node.target))
        node.target = name
    before = region[0].prev
    with owner.graph.inserting_before(region[0]):
        results: Any = owner.graph.graph_copy(traced.graph, inputs)
    while before.next is not region[0]:
        before = before.next
        value = before.meta.pop("val", None)
        before.meta = {**region[0].meta, "example_value": value}
    for node, result in zip(returned, results, strict=True):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
        values[result] = values[node]  # another region may read it
    for node in reversed(region):
        owner.graph.erase_node(node)
