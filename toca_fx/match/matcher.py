"""Find attention and MLP modules in a pre-dispatch ATen graph. Pure: nothing is changed.

A match starts at an anchor, an attention or the last linear of linear -> activation -> linear, and
follows its output to the residual stream:

    stream + gate(timestep) * module(norm(stream))

It counts as a site only if the add is there, inside a block (``graph.modules``), and the stream
that is added to is one that the module reads. So timestep embedders and caption projections are not
sites. What is cached is the module's output before the gate, because the gate depends on the
timestep (ToCa, section 3): behind the output projection and any norm, in front of the first
operator that brings in something else.

Joint attention over two streams is two sites, one per stream. Where attention and MLP share their
output projection (the parallel blocks of FLUX), the MLP's output is that of the projection, and the
attention's what it hands to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from toca_fx.graph.stream import Flow
from toca_fx.match.anchors import attention_at
from toca_fx.match.attention import attention_sites
from toca_fx.match.branches import Found, unexplained
from toca_fx.match.judge import related
from toca_fx.match.mlp import mlp_sites, mlps_of
from toca_fx.match.sites import Matches, NearMiss, Site
from toca_fx.match.states import first_block_of, outputs_of, states_of


def match(graph: fx.Graph) -> Matches:
    """Match every attention and MLP of ``graph``, which comes from ``capture.aten.to_aten``."""
    flow = Flow(graph)
    candidates = list(_candidates(graph, flow))
    found = _distinct(one for one in candidates if isinstance(one, Found))
    misses = [one for one in candidates if isinstance(one, NearMiss)]
    misses += unexplained(flow, found, misses)
    found, refused = _without_sequence_first(found)
    sites = tuple(related(found, flow))
    states, uncut = states_of(graph, sites, flow)
    return Matches(
        sites,
        (*misses, *refused),
        outputs_of(graph),
        states,
        uncut,
        first_block_of(graph, sites, states),
    )


def _candidates(graph: fx.Graph, flow: Flow) -> Iterator[Found | NearMiss]:
    """All attentions and MLPs in execution order, as sites or near misses."""
    mlps = mlps_of(graph, flow)
    merges = {mlp.merge for mlp in mlps.values() if mlp.merge is not None}
    for node in graph.nodes:
        attention = attention_at(node)
        if attention is not None:
            yield from attention_sites(attention, merges, flow)
        elif node in mlps:
            yield from mlp_sites(mlps[node], flow)


def _distinct(found: Iterable[Found]) -> list[Found]:
    """The first of each output: two attentions summed before one projection are one site."""
    first: dict[str, Found] = {}
    for one in found:
        first.setdefault(one.site.output, one)
    return list(first.values())


def _without_sequence_first(found: Sequence[Found]) -> tuple[list[Found], list[NearMiss]]:
    """Sites whose outputs are [batch, tokens, channels], and near misses of the others.

    Where an attention runs along the first axis, the second holds samples, in all sites of the
    block that have this shape.
    """
    refused = {_tokens_of(one.site) for one in found if one.sequence_first}
    kept, misses = [], []
    for one in found:
        site = one.site
        if _tokens_of(site) not in refused:
            kept.append(one)
            continue
        reason = (
            f"its output has shape {site.shape}: [tokens, batch, channels], "
            "not [batch, tokens, channels]"
        )
        misses.append(NearMiss(site.kind, site.path, reason))
    return kept, misses


def _tokens_of(site: Site) -> tuple[str, int, tuple[int, ...]]:
    """The block of a site, and the first two axes of its output."""
    return site.block, site.layer, site.shape[:2]
