"""Plan -> step graphs: the model's graph with cached sites replaced, for one combination of modes.

    full      out = module(x)                                  cache <- out           score <- base_score(q, k, v)
    partial   out = scatter(cache, rows, module(x[rows]))      cache <- out
    reuse     out = cache                                      (the module and its projections are dead code)
    compute   unchanged

``x[rows]`` is taken as far up as ``tokenwise`` proves that operators act per token, at best from the residual stream
itself, above norm and modulation. K, the number of rows, is the size of an index tensor: one graph serves every K.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from toca_fx import tokenwise
from toca_fx.attention import attention_and_influence, feature_norm
from toca_fx.plan import Modes, Plan

aten = torch.ops.aten


@dataclass(frozen=True)
class StepGraph:
    """A rewritten graph and how to call it.

    Inputs, in order: the captured graph's inputs at positions ``kept``, then the caches of sites ``caches``, the score
    buffers of sites ``scores``, the row indices of sites ``rows``. ``fresh_nodes[i]`` names the nodes that work on the
    fresh tokens of site i only (for counting FLOPs).
    """

    module: fx.GraphModule
    modes: Modes
    kept: tuple[int, ...]
    caches: tuple[int, ...]
    scores: tuple[int, ...]
    rows: tuple[int, ...]
    fresh_nodes: dict[int, frozenset[str]]


def rewrite(source: fx.GraphModule, plan: Plan, modes: Modes) -> StepGraph:
    """Build the graph of a step on which site i is in ``modes[i]``. ``source`` is not changed."""
    module = fx.GraphModule(source, copy.deepcopy(source.graph))
    return _Rewriter(module, plan, modes).run()


class _Rewriter:
    """Turns a copy of the model's graph into one step graph; used once."""

    def __init__(self, module: fx.GraphModule, plan: Plan, modes: Modes) -> None:
        self.module, self.graph, self.plan, self.modes = module, module.graph, plan, modes
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.inputs = self.graph.find_nodes(op="placeholder")
        self.last_input = self.inputs[-1]
        self.end = next(iter(self.graph.find_nodes(op="output")))
        self.touched = tuple(i for i, mode in enumerate(modes) if mode in ("full", "partial", "reuse"))
        self.partial = tuple(i for i in self.touched if modes[i] == "partial")
        self.scored = tuple(i for i in plan.scored_by_attention if self._is_judged(i))
        self.anchors = [self.nodes[site.anchor] for site in plan.sites]
        self.influences: dict[int, fx.Node] = {}

    def _is_judged(self, site: int) -> bool:
        """Whether this step renews a site's base score: with its attention, or with itself if that is never cached."""
        attention = self.modes[self.plan.sites[site].influence or 0]
        return attention == "full" or (attention == "compute" and self.modes[site] == "full")

    def run(self) -> StepGraph:
        caches = {i: self._placeholder(f"cache_{i}") for i in self.touched}
        scores = {i: self._placeholder(f"score_{i}") for i in self.scored}
        rows = {i: self._placeholder(f"rows_{i}") for i in self.partial}
        for i in self.scored:
            self._write(scores[i], self._base_score(i))
        merges: dict[int, tuple[fx.Node, fx.Node]] = {}
        for i in self.touched:
            output = self.nodes[self.plan.sites[i].output]
            caches[i].meta["val"] = output.meta["val"]
            if self.modes[i] == "full":
                self._write(caches[i], output)
            elif self.modes[i] == "reuse":
                output.replace_all_uses_with(caches[i])
            else:
                merges[i] = self._merge(i, output, caches[i], rows[i])
        fresh_nodes = self._compute_fresh(merges, rows)
        # FX keeps seeded operators alive, attention among them for its optional dropout.
        self.graph.eliminate_dead_code(is_impure_node=_has_effect)
        kept = tuple(position for position, node in enumerate(self.inputs) if node.users)
        for position, node in enumerate(self.inputs):
            if position not in kept:
                self.graph.erase_node(node)
        self.graph.lint()
        self.module.recompile()
        return StepGraph(self.module, self.modes, kept, self.touched, self.scored, self.partial, fresh_nodes)

    def _placeholder(self, name: str) -> fx.Node:
        with self.graph.inserting_after(self.last_input):
            node: fx.Node = self.graph.placeholder(name)
        self.last_input = node
        return node

    def _write(self, target: fx.Node, value: fx.Node) -> None:
        """One trailing copy per buffer: inductor turns it into the in-place update itself."""
        with self.graph.inserting_before(self.end):
            self.graph.call_function(aten.copy_.default, (target, value))

    def _merge(self, site: int, output: fx.Node, cache: fx.Node, rows: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Put scatter(cache, rows, <fresh>) in the place of ``output``; <fresh> is filled in by ``_compute_fresh``."""
        batch, tokens, channels = self.plan.sites[site].shape
        with self.graph.inserting_after(output):
            flat = self.graph.call_function(aten.view.default, (cache, [batch * tokens, channels]))
        with self.graph.inserting_after(flat):
            scattered = self.graph.call_function(aten.index_put.default, (flat, [rows], output))
        with self.graph.inserting_after(scattered):
            merged = self.graph.call_function(aten.view.default, (scattered, [batch, tokens, channels]))
        merged.meta["val"] = output.meta["val"]
        output.replace_all_uses_with(merged, delete_user_cb=lambda user: user is not scattered)
        self._write(cache, merged)
        return scattered, output

    def _compute_fresh(self, merges: dict[int, tuple[fx.Node, fx.Node]], rows: dict[int, fx.Node]) -> dict[int, frozenset[str]]:
        """Restrict each partial site's computation to its fresh tokens, up to nodes that are needed whole anyway."""
        writes = [node for node in self.graph.nodes if node.target is aten.copy_.default]
        needed = _ancestors([self.end, *writes], stop={scattered for scattered, _ in merges.values()})
        fresh_nodes: dict[int, frozenset[str]] = {}
        for site, (scattered, output) in merges.items():
            restrict = _Restriction(self.graph, rows[site], scattered, needed, self.plan.sites[site].shape[0])
            fresh = restrict(output, 0, 1)
            if fresh is None:
                raise AssertionError(f"{output} is [batch, tokens, channels] and can be gathered itself")
            scattered.args = (scattered.args[0], [rows[site]], fresh)
            needed |= _ancestors(restrict.gathered, stop=set())
            fresh_nodes[site] = frozenset(node.name for node in restrict.created)
        return fresh_nodes

    def _base_score(self, index: int) -> fx.Node:
        """Insert the score of a site's tokens that is known once the attention that judges them has run; [B, N]."""
        site, weights = self.plan.sites[index], self.plan.policies[index].scores
        if site.influence is None:
            raise AssertionError("plan.scored_by_attention lists sites with an attention only")
        attention = self.anchors[site.influence]
        terms = [(weights.value_norm, feature_norm, 2), (weights.key_norm, feature_norm, 1)]
        with self.graph.inserting_before(self.end):
            nodes = [(weight, _inline(self.graph, function, (attention.args[operand],))) for weight, function, operand in terms if weight]
        if weights.self_attention:
            nodes.append((weights.self_attention, self._influence(site.influence)))
        with self.graph.inserting_before(self.end):
            scaled = [self.graph.call_function(aten.mul.Tensor, (node, weight)) for weight, node in nodes]
            return functools.reduce(lambda a, b: self.graph.call_function(aten.add.Tensor, (a, b)), scaled)

    def _influence(self, site: int) -> fx.Node:
        """Make an attention return how much each token is attended to; once, however many sites it judges."""
        if site not in self.influences:
            attention = self.anchors[site]
            with self.graph.inserting_before(attention):
                output, self.influences[site] = _inline(self.graph, attention_and_influence, attention.args, attention.kwargs)
            attention.replace_all_uses_with(output)
            if self.nodes[attention.name] is attention:  # the cached output itself, where no projection follows
                self.nodes[attention.name] = output
        return self.influences[site]


class _Restriction:
    """Copies of nodes that work on the fresh tokens only. ``rows`` [B, K] index the flattened [B * N] tokens.

    Restricted values keep their rank and their batch axis, with K in the place of N, so that every other operand still
    broadcasts. Both axes are followed operator by operator: an axis of the right size alone proves nothing.
    """

    def __init__(self, graph: fx.Graph, rows: fx.Node, before: fx.Node, needed: set[fx.Node], batch: int) -> None:
        self._graph, self._rows, self._before, self._needed, self._batch = graph, rows, before, needed, batch
        self._done: dict[tuple[fx.Node, int, int], fx.Node | None] = {}
        self.created: list[fx.Node] = []
        self.gathered: list[fx.Node] = []

    def __call__(self, node: fx.Node, batch_axis: int, axis: int) -> fx.Node | None:
        """``node`` restricted along ``axis``; None for a list of tensors that cannot be, so that its user has to be."""
        key = (node, batch_axis, axis)
        if key not in self._done:
            restricted = None if node in self._needed else self._recompute(node, batch_axis, axis)
            if restricted is None and isinstance(node.meta.get("val"), Tensor):
                restricted = self._gather(node, batch_axis, axis)
            self._done[key] = restricted
        return self._done[key]

    def _recompute(self, node: fx.Node, batch_axis: int, axis: int) -> fx.Node | None:
        operands = tokenwise.token_operands(node, axis)
        batch_axes = tokenwise.batch_operands(node, batch_axis, self._batch)
        if operands is None or batch_axes is None:
            return None
        replaced: dict[fx.Node, fx.Node] = {}
        for operand, operand_axis in operands.items():
            if operand in batch_axes:
                restricted = self(operand, batch_axes[operand], operand_axis)
            else:
                restricted = self._gather_shared(operand, operand_axis, batch_axis, axis, rank=len(tokenwise.shape_of(node)))
            if restricted is None:
                return None
            replaced[operand] = restricted
        with self._graph.inserting_before(self._before):
            copied = self._graph.node_copy(node, lambda operand: replaced.get(operand, operand))
            if tokenwise.has_sizes(node):
                count = self._graph.call_function(aten.sym_size.int, (self._rows, 1))
                copied.prepend(count)
                copied.args = (copied.args[0], tokenwise.resized(node, axis, count), *copied.args[2:])
        self.created.append(copied)
        return copied

    def _gather(self, node: fx.Node, batch_axis: int, axis: int) -> fx.Node:
        """Take the fresh tokens of every sample out of a whole tensor."""
        shape = tokenwise.shape_of(node)
        front = _to_front(len(shape), batch_axis, axis)
        with self._graph.inserting_before(self._before):
            whole = self._permute(node, front)
            flat = self._graph.call_function(
                aten.reshape.default, (whole, [shape[batch_axis] * shape[axis], *(shape[i] for i in front[2:])])
            )
            taken = self._graph.call_function(aten.index.Tensor, (flat, [self._rows]))
            taken = self._permute(taken, _inverse(front))
        self.gathered.append(node)
        return taken

    def _gather_shared(self, node: fx.Node, node_axis: int, batch_axis: int, axis: int, rank: int) -> fx.Node:
        """Take the fresh tokens out of a tensor that all samples share, such as a table of positions.

        Its user broadcasts it to ``rank`` axes; the result has them all, with the samples along ``batch_axis``.
        """
        shape = tokenwise.shape_of(node)
        padded = [1] * (rank - len(shape)) + list(shape)
        front = _to_front(rank, batch_axis, axis)
        with self._graph.inserting_before(self._before):
            whole = self._permute(self._graph.call_function(aten.reshape.default, (node, padded)), front)
            table = self._graph.call_function(aten.select.int, (whole, 0, 0))
            tokens = self._graph.call_function(aten.remainder.Scalar, (self._rows, shape[node_axis]))
            taken = self._graph.call_function(aten.index.Tensor, (table, [tokens]))
            taken = self._permute(taken, _inverse(front))
        self.gathered.append(node)
        return taken

    def _permute(self, node: fx.Node, order: list[int]) -> fx.Node:
        return node if order == sorted(order) else self._graph.call_function(aten.permute.default, (node, order))


def _to_front(rank: int, *axes: int) -> list[int]:
    """The order of axes that puts ``axes`` first."""
    return [*axes, *(axis for axis in range(rank) if axis not in axes)]


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _inline(graph: fx.Graph, function: Callable[..., Any], args: Any, kwargs: Any = None) -> Any:
    """Trace ``function`` over the fake values of nodes and copy it to the insertion point; returns its output nodes."""
    nodes: list[fx.Node] = []
    fx.node.map_arg((args, kwargs or {}), nodes.append)

    def on_values(*values: Any) -> Any:
        by_node = dict(zip(nodes, values, strict=True))
        args_, kwargs_ = fx.node.map_arg((args, kwargs or {}), by_node.__getitem__)
        return function(*args_, **kwargs_)

    traced = make_fx(on_values, tracing_mode="fake", pre_dispatch=True)(*(node.meta["val"] for node in nodes))
    inputs = traced.graph.find_nodes(op="placeholder")
    return graph.graph_copy(traced.graph, dict(zip(inputs, nodes, strict=True)))


def _has_effect(node: fx.Node) -> bool:
    """Whether dead-code elimination has to leave a node that nobody uses: inputs, outputs and writes."""
    return node.op in ("placeholder", "output") or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


def _ancestors(nodes: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all that they need, without going beyond (but including) ``stop``."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                pending.extend(node.all_input_nodes)
    return found
