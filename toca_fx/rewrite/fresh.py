"""Pass: partial sites compute their fresh tokens, and no others."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor, fx

from toca_fx.graph.axes import first_operand
from toca_fx.graph.edit import ancestors
from toca_fx.graph.names import operator_name
from toca_fx.graph.ops import RELAYOUTS, aten
from toca_fx.graph.tokenwise import Tokens
from toca_fx.kernels.ranking import ranked
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.step import Selection
from toca_fx.rewrite.draft import Draft
from toca_fx.rewrite.report import Gather, PassReport
from toca_fx.rewrite.restrict import Restriction


def compute_fresh(draft: Draft) -> PassReport:
    """Restrict each partial site's computation to its fresh tokens.

    The restriction ends at nodes that are needed whole anyway.
    """
    before = len(draft.graph.nodes)
    rows = _rows(draft)
    merged = {merge.scattered for merge in draft.merges}
    writes = [node for node in draft.graph.nodes if node.target is aten.copy_.default]
    needed = ancestors([draft.end, *writes], stop=merged)
    # A stream that only fresh tokens read (a text that ends before the last block) is summed up
    # whole, block by block: for other tokens in every block, each would go back to the first.
    needed |= {draft.nodes[site.residual] for site in draft.spec.sites if site.residual}
    restrictions: dict[int, Restriction] = {}
    gathers: list[Gather] = []
    order = {node: position for position, node in enumerate(draft.graph.nodes)}
    for merge in sorted(draft.merges, key=lambda merge: order[merge.scattered]):
        value: Tensor = merge.value.meta["val"]
        if merge.site not in restrictions:
            site_rows = rows[merge.site]
            restrictions[merge.site] = Restriction(draft.graph, site_rows, needed, value.device)
        restrict = restrictions[merge.site]
        restrict.before = merge.scattered
        fresh = restrict(merge.value, Tokens(value.shape[0], value.shape[1]))
        if fresh is None:
            message = f"{merge.value} is [batch, tokens, ...] and can be gathered itself"
            raise AssertionError(message)
        kept = merge.buffer.meta["val"].dtype
        if kept != value.dtype:
            with draft.graph.inserting_before(merge.scattered):
                fresh = draft.graph.call_function(aten.to.dtype, (fresh, kept))
        merge.scattered.args = (merge.scattered.args[0], [rows[merge.site]], fresh)
        gathers += _blocked(merge.site, restrict, needed, order)
        needed |= ancestors(restrict.gathered, stop=merged)
    draft.fresh_nodes = {
        site: frozenset(node.name for node in restrict.created)
        for site, restrict in restrictions.items()
    }
    nodes = len(draft.graph.nodes) - before
    return PassReport("fresh tokens", tuple(restrictions), tuple(gathers), nodes)


def _blocked(
    site: int, restrict: Restriction, needed: set[fx.Node], order: dict[fx.Node, int]
) -> list[Gather]:
    """The gathers behind operators that could not be restricted to fresh tokens."""
    found = []
    for node in restrict.take_blocked():
        above = sorted(ancestors([node], stop=needed) - needed - {node}, key=order.__getitem__)
        whole = [_name(other) for other in above if _computes(other)]
        found.append(Gather(site, _name(node), tuple(dict.fromkeys(whole))))
    return found


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in RELAYOUTS


def _name(node: fx.Node) -> str:
    while node.target is operator.getitem:  # one of several tensors
        node = first_operand(node)
    return operator_name(node.target) or str(node.target)


def _rows(draft: Draft) -> dict[int, fx.Node]:
    """The fresh tokens of each partial site, [B, K] rows: given, or chosen in the graph."""
    inside = {selection.site: selection for selection in draft.spec.selections}
    partial = dict.fromkeys(merge.site for merge in draft.merges)
    return {i: _select(draft, inside[i]) if i in inside else _take(draft, i) for i in partial}


def _take(draft: Draft, site: int) -> fx.Node:
    """The best tokens of an order that was made ahead of the step."""
    order, ranks = draft.buffer(Buffer("order", site)), draft.buffer(Buffer("ranks", site))
    with draft.graph.inserting_after(draft.last_input):
        return draft.graph.call_function(aten.index_select.default, (order, 1, ranks))


def _select(draft: Draft, selection: Selection) -> fx.Node:
    """Choose within the step, once the cross-attention has run."""
    graph, site = draft.graph, draft.spec.sites[selection.site]
    entropy = draft.entropies[selection.attention]
    known = draft.buffer(Buffer("known", selection.site), entropy)
    ranks = draft.buffer(Buffer("ranks", selection.site))
    batch, tokens, _ = site.shape

    order_of = functools.partial(
        ranked, weight=selection.weight, shared=draft.spec.shared, spatial=selection.spatial
    )
    # Right behind the cross-attention: keys and values of the site itself may be merged by these
    # rows.
    with graph.inserting_before(entropy.next):
        order = draft.fragments.inline(order_of, (known, entropy))
        chosen = graph.call_function(aten.index_select.default, (order, 1, ranks))
        blank = graph.call_function(aten.zeros_like.default, (known,), {"dtype": torch.bool})
        picked = graph.call_function(aten.scatter.value, (blank, 1, chosen, True))
        if batch > 1:
            on_device = {"device": entropy.meta["val"].device}
            steps = (0, batch * tokens, tokens)
            first = graph.call_function(aten.arange.start_step, steps, on_device)
            column = graph.call_function(aten.unsqueeze.default, (first, 1))
            chosen = graph.call_function(aten.add.Tensor, (chosen, column))
    picked.meta["val"] = torch.empty_like(entropy.meta["val"], dtype=torch.bool)
    draft.write(Buffer("picked", selection.site), picked)
    return chosen
