"""Attentions that are sites, and those that are none."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace

from torch import fx

from toca_fx.graph.ops import is_constant
from toca_fx.graph.stream import Flow
from toca_fx.match.branches import Found, in_a_row, module_output, residuals_behind, site_at
from toca_fx.match.fused import Attention
from toca_fx.match.origins import (
    attention_kind,
    is_sequence_first,
    projections_of,
    rows_of,
    same_tokens,
)
from toca_fx.match.sites import NearMiss, Site


def attention_sites(
    attention: Attention, merges: Set[fx.Node], flow: Flow
) -> Iterator[Found | NearMiss]:
    """The sites of an attention, one per stream that its output is added to, or why there is none.

    ``merges`` are the concatenations behind which an MLP and an attention share a projection.
    """
    node = attention.output
    path = node.meta["path"]
    kind = attention_kind(attention)
    if kind is None:
        learnt = is_constant(attention.query)
        reason = (
            "its query is learnt, not made from a stream"
            if learnt
            else "query or key does not come from a linear projection"
        )
        yield NearMiss("attention", path, reason)
        return
    ends = residuals_behind(node, flow)
    if not ends:
        yield NearMiss(kind, path, "its output is not added to the stream that it reads")
    for add in ends:
        output = _in_a_row(attention, module_output((node,), add, flow, merges), flow)
        site_path = path if len(ends) == 1 else output.meta["path"]
        site = site_at(kind, site_path, (node,), output, add, flow)
        if isinstance(site, NearMiss):
            yield site
        else:
            sequence_first = is_sequence_first(attention, output, site.shape, flow)
            yield Found(_with_map(site, attention, output, flow), add, sequence_first)


def _in_a_row(attention: Attention, output: fx.Node, flow: Flow) -> fx.Node:
    """``output``, or what it is made of [batch, tokens, channels] if it is an image."""
    for node in in_a_row(output):
        batch, tokens, channels = node.meta["val"].shape
        if rows_of(attention, node, (batch, tokens, channels), flow) is not None:
            return node
    return output


def _with_map(site: Site, attention: Attention, output: fx.Node, flow: Flow) -> Site:
    """``site`` with what is known of the rows and columns of its attention's map."""
    rows = rows_of(attention, output, site.shape, flow)
    if rows is None or not attention.plain:
        return site
    read = replace(site, segment=rows.segment, packed=rows.packed)
    if site.kind == "cross_attention":
        return read
    if not same_tokens(attention, site.shape, rows):
        return site
    return replace(read, projections=projections_of(attention, site.shape, rows, flow))
