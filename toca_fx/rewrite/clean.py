"""The last passes: no buffer is returned, and dead code goes."""

from __future__ import annotations

from toca_fx.graph.edit import eliminate_dead_code, erase_unused
from toca_fx.graph.ops import aten
from toca_fx.graph.stream import root
from toca_fx.rewrite.draft import Draft
from toca_fx.rewrite.report import PassReport


def copy_returned(draft: Draft) -> PassReport:
    """Copy the outputs of the model that are buffers, as later steps write to these."""
    added, kept = 0, set(draft.buffers.values())
    for returned in draft.end.all_input_nodes:
        if root(returned) in kept:
            with draft.graph.inserting_before(draft.end):
                copied = draft.graph.call_function(aten.clone.default, (returned,))
            draft.end.replace_input_with(returned, copied)
            added += 1
    return PassReport("copies of what is returned", nodes=added)


def remove_dead(draft: Draft) -> PassReport:
    """Erase the modules that are reused, whole or in part, and the inputs that only they read."""
    before = len(draft.graph.nodes)
    eliminate_dead_code(draft.graph)
    draft.kept = erase_unused(draft.graph, draft.inputs)
    unused = [buffer for buffer, node in draft.buffers.items() if not node.users]
    erase_unused(draft.graph, list(draft.buffers.values()))
    for buffer in unused:
        del draft.buffers[buffer]
    return PassReport("dead code", nodes=len(draft.graph.nodes) - before)
