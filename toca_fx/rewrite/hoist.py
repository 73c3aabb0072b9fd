"""What a step need not compute, because it does not depend on the latents.

    conditions   depend on inputs that stay the same from step to step, such as a caption: keys and values of cross-attention,
                 caption projections, tables of positions
    timed        depend on the timestep as well: the modulations of all blocks, whose weights are read for a handful of rows

Both are cut out of the step graphs, full and partial, and become inputs of them (``hoisted:NAME``,
see ``buffers``). The cut lies behind the last operator that is worth it: what is only moved, scaled
or added afterwards is done in the step, where it is fused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from toca_fx.graph.ops import RELAYOUTS, aten, is_activation, is_cheap
from toca_fx.match.sites import Site


@dataclass(frozen=True)
class Hoisted:
    """Names of the nodes that are computed outside of the step graphs, in order."""

    conditions: tuple[str, ...] = ()
    timed: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.conditions + self.timed


@dataclass(frozen=True)
class Part:
    """A graph that computes hoisted nodes. Inputs: the source's at positions ``kept``, then the
    hoisted ``given``; it returns ``names``.
    """

    module: fx.GraphModule
    kept: tuple[int, ...]
    given: tuple[str, ...]
    names: tuple[str, ...]


# In order: what a node depends on at most.
_STATE, _CONDITION, _TIMED, _VARYING = range(4)
_ROLES = {"state": _STATE, "condition": _CONDITION, "timestep": _TIMED, "latents": _VARYING}


def find_hoistable(graph: fx.Graph, sites: Sequence[Site], memory: int) -> Hoisted:
    """What can be computed outside of the steps, as far as the values of ``conditions`` fit into
    ``memory`` bytes; nothing for 0.

    Nothing of a site is hoisted, nor what depends on one: its output may come from a cache. Nor is
    what depends on the timestep and has as many rows as a site has tokens: a partial step may need
    only some of them.
    """
    if not memory:
        return Hoisted()
    anchors = {site.anchor for site in sites} | {site.output for site in sites}
    fewest = min((site.shape[0] * site.tokens for site in sites), default=0)
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        level[node] = (
            _ROLES[node.meta["role"]]
            if node.op == "placeholder"
            else max((level[o] for o in node.all_input_nodes), default=_STATE)
        )
        if (
            node.name in anchors
            or node.op == "output"
            or _is_random(node)
            or (
                level[node] == _TIMED
                and node.op == "call_function"
                and not _is_cheap(node)
                and _rows(node) >= fewest
            )
        ):
            level[node] = _VARYING
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if _STATE < level[operand] < level[node]:
                found.update(dict.fromkeys(_sources(operand, level)))
    ordered = [node for node in graph.nodes if node in found]
    conditions = []
    for node in ordered:
        size = nbytes_of(node)
        if level[node] == _CONDITION and size <= memory:
            conditions.append(node.name)
            memory -= size
    return Hoisted(tuple(conditions), tuple(node.name for node in ordered if level[node] == _TIMED))


def extract(source: fx.GraphModule, names: Sequence[str], given: Collection[str] = ()) -> Part:
    """The part of ``source`` that computes the nodes ``names``; the values of ``given`` are there
    already. ``source`` is not changed.
    """
    graph = copy.deepcopy(source.graph)
    nodes = {node.name: node for node in graph.nodes}
    inputs = graph.find_nodes(op="placeholder")
    last = inputs[-1]
    for name in given:
        with graph.inserting_after(last):
            last = graph.placeholder(f"hoisted_{name}")
        last.meta["val"] = nodes[name].meta["val"]
        nodes[name].replace_all_uses_with(last)
    end = next(iter(graph.find_nodes(op="output")))
    with graph.inserting_before(end):
        end.args = (
            tuple(graph.call_function(aten.contiguous.default, (nodes[name],)) for name in names),
        )
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    kept = tuple(position for position, node in enumerate(inputs) if node.users)
    used = tuple(
        name
        for name, node in zip(given, graph.find_nodes(op="placeholder")[len(inputs) :], strict=True)
        if node.users
    )
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    return Part(fx.GraphModule(source, graph), kept, used, tuple(names))


def _sources(node: fx.Node, level: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """The nearest nodes upstream that are worth hoisting, ``node`` itself perhaps; none on a way
    that leads to inputs only.
    """
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function" or level[node] == _STATE:
            continue
        seen.add(node)
        if _is_cheap(node) or not isinstance(node.meta.get("val"), Tensor):
            pending.extend(node.all_input_nodes)
        else:
            yield node


def _is_cheap(node: fx.Node) -> bool:
    """Whether a node costs a step nothing: it moves, scales or adds, and is fused with what reads
    it.
    """
    return node.target in RELAYOUTS or (is_cheap(node) and not is_activation(node))


def _is_random(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
        and not _is_cheap(node)
    )


def _rows(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(value.shape[:-1]) if isinstance(value, Tensor) else 0


def nbytes_of(node: fx.Node) -> int:
    """Bytes of a node's value."""
    value: Tensor = node.meta["val"]
    return value.numel() * value.element_size()
