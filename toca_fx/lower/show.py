"""Graphs for those who look on: in the log, and in the report of tlparse."""

from __future__ import annotations

import logging

from torch import fx

from toca_fx.torch_private import trace_structured

log = logging.getLogger(__name__)


def show(name: str, module: fx.GraphModule) -> None:
    """Log the code of a graph, and hand it to torch's structured trace.

    The log is at level DEBUG (TORCH_LOGS="+toca_fx"); in the trace (TORCH_TRACE=folder) the graph
    is the artifact ``toca_fx_NAME``.
    """

    def code() -> str:
        return module.print_readable(print_output=False)

    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", name, code())
    artifact = {"name": f"toca_fx_{name}", "encoding": "string"}
    trace_structured("artifact", metadata_fn=lambda: artifact, payload_fn=code)
