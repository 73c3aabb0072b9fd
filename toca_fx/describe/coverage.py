"""How much of a model was matched: attentions, MLPs, and the share of the blocks' FLOPs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from toca_fx.graph.modules import OUTSIDE
from toca_fx.graph.network import needed
from toca_fx.graph.stream import Flow
from toca_fx.lower.flops import count_flops
from toca_fx.match.anchors import attention_at
from toca_fx.match.sites import Matches


@dataclass(frozen=True)
class Coverage:
    """How much of a model was matched.

    ``found`` are the numbers of sites by kind; ``attentions`` and ``mlps`` are pairs, those found
    and all in the blocks. ``share`` is that of the blocks' FLOPs that fall away when all sites are
    taken from their caches. Blocks are the numbered modules that have a residual stream: the layers
    of a timestep embedder are numbered, too. ``uncut`` says why a step without any block cannot
    begin at the model's state ("" if it can).
    """

    found: dict[str, int]
    attentions: tuple[int, int]
    mlps: tuple[int, int]
    share: float
    uncut: str


def coverage(module: fx.GraphModule, matches: Matches) -> Coverage:
    """The coverage of a graph from ``capture.aten.to_aten`` by its matches; nothing is run."""
    graph = module.graph
    (end,) = graph.find_nodes(op="output")
    left_over = needed(graph, [end.name], given={site.output for site in matches.sites})
    flow = Flow(graph)
    blocks = {flow.block_of([add]) for add in flow.residuals} - {OUTSIDE}
    inside = {node.name: node for node in graph.nodes if flow.block_of([node]) in blocks}
    attentions = [name for name, node in inside.items() if attention_at(node) is not None]
    mlps = {site.anchor for site in matches.sites if site.kind == "mlp"}
    whole = {site.path for site in matches.sites if site.whole}  # near misses that are sites too
    missed = sum(miss.kind == "mlp" and miss.path not in whole for miss in matches.misses)
    inputs = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    flops = count_flops(module, inputs)
    total = sum(spent for name, spent in flops.items() if name in inside)
    left = sum(spent for name, spent in flops.items() if name in inside and name in left_over)
    return Coverage(
        found=dict(Counter(site.kind for site in matches.sites)),
        attentions=(sum(name not in left_over for name in attentions), len(attentions)),
        mlps=(len(mlps), len(mlps) + missed),
        share=(total - left) / total if total else 0.0,
        uncut=matches.uncut,
    )
