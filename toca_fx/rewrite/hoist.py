"""What a step need not compute, because it does not depend on the latents.

    conditions   depend on inputs that stay the same from step to step, such as a caption: keys and
                 values of cross-attention, caption projections, tables of positions
    timed        depend on the timestep as well: the modulations of all blocks, whose weights are
                 read for a handful of rows

Both are cut out of the step graphs, full and partial, and become inputs of them (``plan.buffers``).
The cut lies behind the last operator that is worth it: what is only moved, scaled or added
afterwards is done in the step, where it is fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from toca_fx.graph.ops import RELAYOUTS, is_activation, is_cheap, is_random
from toca_fx.match.sites import Site
from toca_fx.plan.buffers import hoisted
from toca_fx.rewrite.draft import Draft
from toca_fx.rewrite.report import PassReport


@dataclass(frozen=True)
class Hoisted:
    """Names of the nodes that are computed outside of the step graphs, in order."""

    conditions: tuple[str, ...] = ()
    timed: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.conditions + self.timed


# What a node depends on, in increasing order.
_STATE, _CONDITION, _TIMED, _VARYING = range(4)
_ROLES = {
    "state": _STATE,
    "condition": _CONDITION,
    "timestep": _TIMED,
    "other timestep": _VARYING,  # the first timestep does not say what it is
    "latents": _VARYING,
}


def find_hoistable(graph: fx.Graph, sites: Sequence[Site], memory: int) -> Hoisted:
    """The nodes that can be computed outside of the steps; none for a ``memory`` of 0.

    The values of ``conditions`` take at most ``memory`` bytes. No node of a site is hoisted, and
    none that depends on one, as the output of a site may come from a cache. A node that depends on
    the timestep and has as many rows as a site has tokens is not hoisted either: a partial step may
    need only some of them.
    """
    if not memory:
        return Hoisted()
    anchors = {site.anchor for site in sites} | {site.output for site in sites}
    fewest = min((site.shape[0] * site.tokens for site in sites), default=0)
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            level[node] = _ROLES[node.meta["role"]]
        else:
            level[node] = max((level[o] for o in node.all_input_nodes), default=_STATE)
        is_work = node.op == "call_function" and not _is_cheap(node)
        per_token = is_work and level[node] == _TIMED and _rows(node) >= fewest
        is_drawn = is_work and is_random(node)
        if node.name in anchors or node.op == "output" or is_drawn or per_token:
            level[node] = _VARYING
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if _STATE < level[operand] < level[node]:
                found.update(dict.fromkeys(_sources(operand, level)))
    ordered = [node for node in graph.nodes if node in found]
    conditions = []
    for node in ordered:
        size = node.meta["val"].nbytes
        if level[node] == _CONDITION and size <= memory:
            conditions.append(node.name)
            memory -= size
    return Hoisted(tuple(conditions), tuple(node.name for node in ordered if level[node] == _TIMED))


def take_hoisted(draft: Draft) -> PassReport:
    """Pass: make inputs of hoisted nodes; what only they depended on becomes dead code."""
    for name in draft.spec.hoisted:
        node = draft.nodes[name]
        node.replace_all_uses_with(draft.buffer(hoisted(name), node))
    return PassReport("hoisted values", nodes=len(draft.spec.hoisted))


def _sources(node: fx.Node, level: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """The nearest nodes upstream, from ``node`` itself on, that are worth hoisting."""
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
    """Whether a node only moves, scales or adds, and is fused with what reads it."""
    return node.target in RELAYOUTS or (is_cheap(node) and not is_activation(node))


def _rows(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(value.shape[:-1]) if isinstance(value, Tensor) else 0
