"""Passes: memories of sites are written, read, or renewed for fresh tokens.

Modules that share a cache (``cache.grain: block``) are replaced together:

    full      after = module_2(module_1(stream))               cache <- after - stream
    reuse     after = stream + cache

Where a unit has a history, full steps write the tensor that is the newest from then on, and what is
read is the weighted sum of all: its forecast.

What a site keeps besides its output is treated alike: the keys and values of an attention whose
queries are computed for fresh tokens only, and the entropies of a cross-attention.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from toca_fx.graph.ops import aten
from toca_fx.plan.buffers import Buffer, memory
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
    graph, sites = draft.graph, draft.spec.sites
    stream, residual = draft.nodes[sites[run[0]].stream], sites[run[-1]].residual
    end = draft.nodes[residual]
    if draft.spec.modes[run[0]] == "skip":
        return
    if draft.spec.modes[run[0]] == "reuse":
        added = draft.forecast(run[0], end)
        with graph.inserting_after(end):
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
        draft.write(memory(run[0], draft.spec.histories[run[0]])[0], added)


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
                draft.merges += _merge(draft, buffer, node)
            elif mode == "reuse":
                is_cache = buffer.role == "cache"
                kept = draft.buffer(buffer, node)
                read = draft.forecast(i, node) if is_cache else draft.cast(kept, node, after=node)
                node.replace_all_uses_with(read)
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
    if draft.spec.modes[index] not in ("compute", "skip") and not draft.spec.in_run(index):
        newest, *_ = memory(index, draft.spec.histories[index])
        yield newest, draft.nodes[site.output]


def _merge(draft: Draft, buffer: Buffer, value: fx.Node) -> list[Merge]:
    """Write the fresh part of ``value`` over the rest: in the buffer, and for whoever reads it.

    Rows and fresh values are put in later. Of a history the newest value is written; what is read
    is the forecast but for the fresh tokens.
    """
    kept = draft.buffer(buffer, value)
    written = _scattered(draft, kept, value)
    merges, read = [Merge(buffer.site, value, kept, written.args[0])], written  # type: ignore[arg-type]
    if buffer.role == "cache" and draft.spec.histories[buffer.site] > 1:
        read = _scattered(draft, draft.forecast(buffer.site, value), value)
        merges.append(Merge(buffer.site, value, value, read.args[0]))  # type: ignore[arg-type]
    merged = draft.cast(read, value, after=read)
    scattered = {merge.scattered for merge in merges}
    value.replace_all_uses_with(merged, delete_user_cb=lambda user: user not in scattered)
    if draft.entropies.get(buffer.site) is value:
        draft.entropies[buffer.site] = merged
    draft.write(buffer, written)
    return merges


def _scattered(draft: Draft, kept: fx.Node, value: fx.Node) -> fx.Node:
    """``kept`` with rows of ``value`` written over it, as a view of what is scattered."""
    graph, sizes = draft.graph, list(value.meta["val"].shape)
    with graph.inserting_after(value):
        flat = graph.call_function(aten.view.default, (kept, [sizes[0] * sizes[1], *sizes[2:]]))
    with graph.inserting_after(flat):
        scattered = graph.call_function(aten.index_put.default, (flat, [], value))
    with graph.inserting_after(scattered):
        whole = graph.call_function(aten.view.default, (scattered, sizes))
    whole.meta["val"] = kept.meta["val"]
    return whole
