"""What is left of a model once all blocks have run: its state, and what it returns.

    stream -> block -> ... -> block -> state -> output layers (norm, projection) -> output

Where one of them is known, a step can do without any block. The state is found from the outputs
upstream: the nearest adds of residual streams in blocks, be what they add a site or not. A stream
that does not depend on the latents (blocks that embed the timestep) is no state: it is computed.
Behind the adds, views and slices of the state that nothing else reads make it smaller (the image's
tokens, without those of the text).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, fx

from toca_fx.graph.modules import OUTSIDE
from toca_fx.graph.ops import RELAYOUTS
from toca_fx.graph.stream import Flow
from toca_fx.match.sites import Site


def states_of(graph: fx.Graph, sites: Sequence[Site], flow: Flow) -> tuple[tuple[Site, ...], str]:
    """The states that the output layers read, as sites; or none, and why.

    Several streams can end in the outputs: each has its state.
    """
    nodes = {node.name: node for node in graph.nodes}
    varying = _varying(graph)
    ends = {nodes[site.residual] for site in sites if site.residual}
    ends |= {add for add in flow.residuals if flow.block_of([add]) != OUTSIDE}
    inside = {nodes[name]: site for site in sites for name in (site.anchor, site.output)}
    (output,) = graph.find_nodes(op="output")
    found: dict[fx.Node, None] = {}
    seen, pending = {output}, [output]
    while pending:
        node = pending.pop()
        if node in ends & varying:
            found[node] = None
            continue
        if node in inside and node in varying:
            site = inside[node]
            return (), f"the outputs read `{site.path}` ({site.kind}) beside the residual stream"
        for operand in node.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    if not found:
        what = "residual stream of blocks" if varying else "input that is recognised as latents"
        return (), f"the outputs read no {what}"
    position = flow.position
    states = sorted({_narrowed(node, seen) for node in found}, key=position.__getitem__)
    return tuple(_site("state", node) for node in states), ""


def outputs_of(graph: fx.Graph) -> tuple[Site, ...]:
    """The tensors that the model returns and makes of its latents, as sites."""
    (output,) = graph.find_nodes(op="output")
    varying = _varying(graph)
    returned = dict.fromkeys(output.all_input_nodes)
    return tuple(_site("output", node) for node in returned if _is_made(node, varying))


def first_block_of(
    graph: fx.Graph, sites: Sequence[Site], states: Sequence[Site]
) -> tuple[str, ...]:
    """The stream of the latents in front of the first block, and behind it; () if there is none.

    Where a block has several streams, it is that of the tokens that the state has, or of the most.
    """
    nodes, varying = {node.name: node for node in graph.nodes}, _varying(graph)
    tokens = {state.tokens for state in states}
    found = [site for site in sites if site.stream and nodes[site.stream] in varying]
    found = [site for site in found if site.tokens in tokens] or found
    inside = [
        site for site in found if (site.block, site.layer) == (found[0].block, found[0].layer)
    ]
    if not inside:
        return ()
    most = max(site.tokens for site in inside)  # the latents' are more than the text's
    inside = [site for site in inside if site.tokens == most]
    before, behind = inside[0].stream, inside[-1].residual
    alike = len({getattr(nodes[each].meta["val"], "shape", ()) for each in (before, behind)}) == 1
    return (before, behind) if alike else ()


def _varying(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on the latents."""
    found = set[fx.Node]()
    for node in graph.nodes:
        is_latents = node.op == "placeholder" and node.meta.get("role") == "latents"
        if is_latents or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_made(node: fx.Node, varying: set[fx.Node]) -> bool:
    return node in varying and node.op != "placeholder" and isinstance(node.meta.get("val"), Tensor)


def _narrowed(state: fx.Node, read: set[fx.Node]) -> fx.Node:
    """The last part or view of ``state`` that all of its readers among ``read`` read it by."""
    while True:
        users = [user for user in state.users if user in read]
        only = users[0] if len(users) == 1 else None
        value = None if only is None else only.meta.get("val")
        kept = state.meta.get("val")
        if only is None or only.target not in RELAYOUTS:
            return state
        if not isinstance(value, Tensor) or not isinstance(kept, Tensor):
            return state
        # What is kept has the precision of the stream.
        if value.dtype != kept.dtype or value.numel() > kept.numel():
            return state
        state = only


def _site(kind: str, node: fx.Node) -> Site:
    """The site of a tensor of any rank: its axes but the first and the last count as tokens."""
    value = node.meta.get("val")
    sizes = tuple(value.shape) if isinstance(value, Tensor) else ()
    batch, *tokens, channels = (*(1,) * (2 - len(sizes)), *sizes)
    return Site(kind, "", 0, "", node.name, node.name, (batch, math.prod(tokens), channels))
