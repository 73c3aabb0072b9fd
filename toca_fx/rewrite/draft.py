"""A copy of the model's graph that passes turn into a step graph."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from toca_fx.graph.fragments import Fragments
from toca_fx.graph.ops import aten
from toca_fx.kernels.forecast import weighted_sum, weights_dtype
from toca_fx.plan.buffers import FEATURES, Buffer, memory
from toca_fx.plan.step import StepSpec


@dataclass(frozen=True)
class Merge:
    """The node ``scattered`` writes the fresh rows of ``value`` over ``buffer`` of ``site``."""

    site: int
    value: fx.Node
    buffer: fx.Node
    scattered: fx.Node


class Draft:
    """The graph, which one pass after the other changes, and what passes hand to each other.

    ``nodes`` are those of the source by name; a pass that replaces one of them writes the new node
    there. ``fragments`` puts functions of tensors into the graph. ``scores`` are those of an
    attention by its anchor and the score's name, ``entropies`` those of cross-attentions by site,
    ``fresh_nodes`` the names of the nodes that work on fresh tokens only, and ``kept`` the
    positions of the model's inputs that are still read.
    """

    def __init__(self, source: fx.GraphModule, spec: StepSpec) -> None:
        self.graph = copy.deepcopy(source.graph)
        self.fragments = Fragments(self.graph)
        self.spec = spec
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.inputs: list[fx.Node] = self.graph.find_nodes(op="placeholder")
        (self.end,) = self.graph.find_nodes(op="output")
        self.buffers: dict[Buffer, fx.Node] = {}
        self.scores: dict[tuple[str, str], fx.Node] = {}
        self.entropies: dict[int, fx.Node] = {}
        self.merges: list[Merge] = []
        self.fresh_nodes: dict[int, frozenset[str]] = {}
        self.kept = tuple(range(len(self.inputs)))
        self._last_input = self.inputs[-1]

    @property
    def last_input(self) -> fx.Node:
        """The last placeholder; the first node that computes something comes behind it."""
        return self._last_input

    def buffer(self, buffer: Buffer, like: fx.Node | None = None) -> fx.Node:
        """The placeholder of a buffer; the first call makes it.

        The fake value of the new placeholder is that of ``like``, in the dtype of the buffer.
        """
        found = self.buffers.get(buffer)
        if found is None:
            with self.graph.inserting_after(self._last_input):
                node = self.graph.placeholder(buffer.name)
            node.meta["buffer"] = buffer
            if like is not None:
                value: Tensor = like.meta["val"]
                node.meta["val"] = value.to(kept_dtype(self.spec.dtypes, buffer, value.dtype))
            found = self.buffers[buffer] = self._last_input = node
        return found

    def forecast(self, site: int, like: fx.Node) -> fx.Node:
        """What the memory of a site makes of its values for this step, in the dtype of ``like``.

        It stands in front of ``like``.
        """
        kept = [self.buffer(part, like) for part in memory(site, self.spec.histories[site])]
        if len(kept) == 1:
            return self.cast(kept[0], like, after=like)
        value: Tensor = like.meta["val"]
        weights = self.buffer(Buffer("weights", site))
        if "val" not in weights.meta:
            dtype = weights_dtype(value.dtype)
            weights.meta["val"] = value.new_empty(len(kept), dtype=dtype)
        summed = functools.partial(weighted_sum, dtype=value.dtype)
        with self.graph.inserting_before(like):
            return self.fragments.inline(summed, (weights, *kept))  # type: ignore[no-any-return]

    def write(self, buffer: Buffer, value: fx.Node) -> None:
        """Update a buffer by a copy at the end, of which inductor makes a write in place."""
        target = self.buffer(buffer, value)
        with self.graph.inserting_before(self.end):
            self.graph.call_function(aten.copy_.default, (target, value))

    def cast(self, node: fx.Node, like: fx.Node, *, after: fx.Node) -> fx.Node:
        """``node`` in the dtype of ``like``."""
        dtype = like.meta["val"].dtype
        if node.meta["val"].dtype == dtype:
            return node
        with self.graph.inserting_after(after):
            converted = self.graph.call_function(aten.to.dtype, (node, dtype))
        converted.meta["val"] = node.meta["val"].to(dtype)
        return converted


def kept_dtype(dtypes: tuple[str, ...], buffer: Buffer, computed: torch.dtype) -> torch.dtype:
    """The dtype in which a buffer holds values that are ``computed`` in another.

    For features the policy says it, ``dtypes`` by site.
    """
    wanted = dtypes[buffer.site] if buffer.role in FEATURES else "model"
    found: torch.dtype = computed if wanted == "model" else getattr(torch, wanted)
    return found
