"""Relations between sites: whose attention scores whose tokens, and which site follows which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from toca_fx.graph.ops import is_cheap
from toca_fx.graph.stream import Flow, root
from toca_fx.match.branches import Found
from toca_fx.match.origins import unshaped
from toca_fx.match.sites import Site


def related(found: Sequence[Found], flow: Flow) -> Iterator[Site]:
    """The sites, each with the attentions that score its tokens, and the site that it follows."""
    ends = {one.add for one in found}
    for index, one in enumerate(found):
        chain = _chain(one.add, ends, flow)
        peers = [at for at, other in enumerate(found) if _maps_tokens(other.site, one.site)]
        # On the same stream first; then what ran before, nearest first.
        peers.sort(key=lambda at: (found[at].add not in chain, at > index, abs(at - index)))
        crossing = [at for at in peers if found[at].site.kind == "cross_attention"]
        mutual = [at for at in peers if at not in crossing and at <= index]
        yield replace(
            one.site,
            influence=mutual[0] if mutual else None,
            entropy=crossing[0] if crossing else None,
            follows=_followed(index, found, flow),
        )


def _chain(add: fx.Node, ends: set[fx.Node], flow: Flow) -> set[fx.Node]:
    """``add`` and the adds before it on the same stream, as far back as all are in ``ends``."""
    chain, node = {add}, root(flow.residuals[add][0])
    while node in ends:
        chain.add(node)
        node = root(flow.residuals[node][0])
    return chain


def _maps_tokens(attention: Site, site: Site) -> bool:
    """Whether the map of ``attention``, in the same block, has the tokens of ``site``."""
    return (
        attention.segment is not None
        and _same_block(attention, site)
        and attention.shape[:2] == site.shape[:2]
    )


def _same_block(one: Site, other: Site) -> bool:
    return (one.block, one.layer) == (other.block, other.layer)


def _followed(index: int, found: Sequence[Found], flow: Flow) -> int | None:
    """The index for ``follows`` of the site at ``index``; None if it follows none."""
    add = found[index].add
    stream = unshaped(flow.residuals[add][0])
    for at in reversed(range(index)):
        other = found[at]
        if not _same_block(other.site, found[index].site):
            continue
        if other.add is add:
            return at if _joins_sites_only(add, found, flow) else None
        if other.add is stream:
            is_alone = _is_read_within(flow.between(stream, add)) and all(
                _joins_sites_only(end, found, flow) for end in (add, stream)
            )
            return at if is_alone else None
    return None


def _is_read_within(region: Sequence[fx.Node]) -> bool:
    """Whether nothing but the nodes of ``region`` reads them, the last one aside."""
    inside = set(region)
    return all(user in inside for node in region[:-1] for user in node.users)


def _joins_sites_only(add: fx.Node, found: Sequence[Found], flow: Flow) -> bool:
    """Whether all work between a stream and what ``add`` makes of it belongs to sites."""
    stream, branch = flow.residuals[add]
    region = flow.between(flow.read_by(branch, stream) or root(stream), branch)
    names = {one.site.output for one in found if one.add is add}
    outputs = [node for node in region if node.name in names]
    return all(
        is_cheap(node) or any(flow.reaches(node, output) for output in outputs) for node in region
    )
