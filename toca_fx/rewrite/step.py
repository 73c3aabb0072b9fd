"""Plan -> step graphs: the model's graph with cached sites replaced, for one combination of modes.

    full      out = module(x)                                 cache <- out    score <- s(q, k, v)
    partial   out = scatter(cache, rows, module(x[rows]))     cache <- out
    reuse     out = cache                                     (the module is dead code)
    compute   unchanged

K, the number of rows, is the size of an index tensor: one graph serves every K.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import fx

from toca_fx.plan.step import StepSpec
from toca_fx.rewrite.clean import copy_returned, remove_dead
from toca_fx.rewrite.draft import Draft
from toca_fx.rewrite.fresh import compute_fresh
from toca_fx.rewrite.hoist import take_hoisted
from toca_fx.rewrite.memories import keep_features, share_caches
from toca_fx.rewrite.report import PassReport
from toca_fx.rewrite.scores import score_attentions
from toca_fx.rewrite.step_graph import StepGraph

log = logging.getLogger(__name__)

PASSES: tuple[Callable[[Draft], PassReport], ...] = (
    take_hoisted,  # what does not depend on the latents becomes an input
    score_attentions,  # attentions give scores of their tokens
    share_caches,  # one cache for modules that follow each other
    keep_features,  # outputs, keys, values and entropies are written, merged or read
    copy_returned,  # what the model returns is no buffer
    compute_fresh,  # partial sites compute their fresh tokens only
    remove_dead,  # what is not used any more
)


def rewrite(source: fx.GraphModule, spec: StepSpec) -> StepGraph:
    """Build the graph of a step. ``source`` is not changed."""
    draft = Draft(source, spec)
    reports = []
    for apply in PASSES:
        report = apply(draft)
        reports.append(report)
        log.info("%s", report)
    draft.graph.lint()
    module, buffers = fx.GraphModule(source, draft.graph), tuple(draft.buffers)
    return StepGraph(module, draft.kept, buffers, draft.fresh_nodes, tuple(reports))
