"""Writes to the model's buffers: a table of a rotary embedding at the first call, a counter.

A rewritten graph writes to nothing but its own memories, and on partial steps it does not compute
everything. What buffers hold after a call is therefore computed beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.graph import roles
from toca_fx.graph.edit import ancestors, used_inputs
from toca_fx.graph.ops import is_cheap, is_random
from toca_fx.torch_private import is_mutable, storage_id


@dataclass(frozen=True)
class Updates:
    """What the inputs at ``positions`` hold after a call: ``values`` of all inputs.

    ``reads`` are the positions of those that are read or written.
    """

    positions: tuple[int, ...] = ()
    values: fx.GraphModule | None = None
    reads: tuple[int, ...] = ()

    def apply(self, inputs: Sequence[Any]) -> None:
        """Write to the inputs of a call what the model writes."""
        if self.values is not None:
            with torch.no_grad():
                for at, value in zip(self.positions, self.values(*inputs), strict=True):
                    inputs[at].copy_(value)

    def apart(self, inputs: Sequence[Any]) -> list[Any]:
        """``inputs``, with copies of those that a call writes to."""
        return [value.clone() if at in self.positions else value for at, value in enumerate(inputs)]


def written_buffers(
    graph: fx.Graph, sources: Sequence[str], inputs: Sequence[Any]
) -> list[fx.Node]:
    """The inputs that are buffers of the model, or tensors that it has otherwise, and written to.

    Parameters are none, and no buffer whose memory another input shares.
    """
    model = roles.model_name(sources)
    placeholders = graph.find_nodes(op="placeholder")
    storages = [_storage(node) for node in placeholders]
    written = {
        _storage(node.args[0]) for node in graph.nodes if is_mutable(node.target) and node.args
    }
    return [
        node
        for node, storage, source, value in zip(
            placeholders, storages, sources, inputs, strict=True
        )
        if storage is not None
        and storage in written
        and storages.count(storage) == 1
        and roles.is_state(source, value, model)
        and not isinstance(value, nn.Parameter)
    ]


def updates_of(graph: fx.Graph, buffers: Iterable[fx.Node], after: Iterable[Any]) -> Updates:
    """The updates of ``buffers`` to what they hold ``after`` a call, nodes of ``graph``.

    The graph is marked with roles.

    Raises:
        UnsupportedModelError: it takes more than moving numbers about to compute what is written.
    """
    changed = [(node, value) for node, value in zip(buffers, after, strict=True) if value != node]
    if not changed:
        return Updates()
    needed = ancestors([value for _, value in changed])
    for node in needed:
        free = node.op != "call_function" or node.meta["constant"] or is_cheap(node)
        if not free or is_random(node):
            lines = ", ".join(str(buffer) for buffer, _ in changed)
            raise UnsupportedModelError(
                f"the model writes to its buffers ({lines}) what {node.target} computes in module "
                f"{node.meta['path'] or '(top level)'} at every call, and partial steps do not "
                "compute everything: keep it out of the model, or exclude the module from "
                "compilation"
            )
    placeholders = graph.find_nodes(op="placeholder")
    values, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = values.node_copy(node, copies.__getitem__)
    values.output([copies[value] for _, value in changed])
    positions = tuple(placeholders.index(node) for node, _ in changed)
    reads = tuple({*positions, *used_inputs(values)})
    return Updates(positions, fx.GraphModule(nn.Module(), values), reads)


def _storage(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return storage_id(value) if isinstance(value, Tensor) else None
