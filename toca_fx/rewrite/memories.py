"""Passes: memories of sites are written, read, or renewed for fresh tokens.

Modules that share a cache (``cache.grain: block``) are replaced together:

    full      after = module_2(module_1(stream))               cache <- after - stream
    reuse     after = stream + cache

What a site keeps besides its output is treated alike: the keys and values of an attention whose
queries are computed for fresh tokens only, and the entropies of a cross-attention.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from toca_fx.graph.ops import aten
from toca_fx.plan.buffers import Buffer
from toca_fx.rewrite.draft import Draft, Merge
from toca_fx.rewrite.report import PassReport


def share_caches(draft: Draft) -> PassReport:
    """Make one cache for what all sites of a run add to the stream."""
    before = len(draft.graph.nodes)
    for run in draft.spec.runs:
        _share(draft, run)
    sites = tuple(i for run in draft.spec.runs for i in run)
    return PassReport("shared caches", sites, nodes=len(draft.graph.nodes) - before)


def _share(draft: Draft, run: tuple[int, ...]) -> None:
    graph, sites, cache = draft.graph, draft.spec.sites, Buffer("cache", run[0])
    stream, residual = draft.nodes[sites[run[0]].stream], sites[run[-1]].residual
    end = draft.nodes[residual]
    kept = draft.buffer(cache, end)
    if draft.spec.modes[run[0]] == "reuse":
        added = draft.cast(kept, end, after=end)
        with graph.inserting_after(end if added is kept else added):
            total = graph.call_function(aten.add.Tensor, (stream, added))
        total.meta["val"] = stream.meta["val"] + added.meta["val"]
        # The dtype of the stream may change along the run.
        after = draft.cast(total, end, after=total)
        end.replace_all_uses_with(after)
        draft.nodes[residual] = after
    else:
        with graph.inserting_after(end):
            added = graph.call_function(aten.sub.Tensor, (end, stream))
        added.meta["val"] = end.meta["val"] - stream.meta["val"]
        draft.write(cache, added)


def keep_features(draft: Draft) -> PassReport:
    """Write what a site keeps if the site is computed, and read it if the site is reused.

    On a partial step it is merged: the fresh part, which ``compute_fresh`` makes, is written over
    the rest.
    """
    before = len(draft.graph.nodes)
    changed: dict[int, None] = {}
    for i, mode in enumerate(draft.spec.modes):
        for buffer, node in _features(draft, i):
            changed[i] = None
            if mode == "partial":
                draft.merges.append(_merge(draft, buffer, node))
            elif mode == "reuse":
                kept = draft.buffer(buffer, node)
                node.replace_all_uses_with(draft.cast(kept, node, after=node))
            else:
                draft.write(buffer, node)
    return PassReport("memories", tuple(changed), nodes=len(draft.graph.nodes) - before)


def _features(draft: Draft, index: int) -> Iterator[tuple[Buffer, fx.Node]]:
    """The buffers that a site keeps from step to step, with their nodes, upstream first."""
    site = draft.spec.sites[index]
    if index in draft.spec.keys:
        for part, name in enumerate(site.projections):
            yield Buffer("keys", index, part), draft.nodes[name]
    if index in draft.entropies:
        yield Buffer("entropy", index), draft.entropies[index]
    if draft.spec.modes[index] != "compute" and not draft.spec.in_run(index):
        yield Buffer("cache", index), draft.nodes[site.output]


def _merge(draft: Draft, buffer: Buffer, value: fx.Node) -> Merge:
    """Replace ``value`` by scatter(buffer, rows, fresh); rows and fresh are put in later."""
    graph, sizes = draft.graph, list(value.meta["val"].shape)
    kept = draft.buffer(buffer, value)
    with graph.inserting_after(value):
        flat = graph.call_function(aten.view.default, (kept, [sizes[0] * sizes[1], *sizes[2:]]))
    with graph.inserting_after(flat):
        scattered = graph.call_function(aten.index_put.default, (flat, [], value))
    with graph.inserting_after(scattered):
        whole = graph.call_function(aten.view.default, (scattered, sizes))
    whole.meta["val"] = kept.meta["val"]
    merged = draft.cast(whole, value, after=whole)
    value.replace_all_uses_with(merged, delete_user_cb=lambda user: user is not scattered)
    if draft.entropies.get(buffer.site) is value:
        draft.entropies[buffer.site] = merged
    draft.write(buffer, whole)
    return Merge(buffer.site, value, kept, scattered)
