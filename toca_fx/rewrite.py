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
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from toca_fx import select, tokenwise
from toca_fx.plan import Modes, Plan
from toca_fx.policy import Scores

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
    def __init__(self, module: fx.GraphModule, plan: Plan, modes: Modes) -> None:
        self.module, self.graph, self.plan, self.modes = module, module.graph, plan, modes
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.inputs = self.graph.find_nodes(op="placeholder")
        self.last_input = self.inputs[-1]
        self.end = next(iter(self.graph.find_nodes(op="output")))
        self.touched = tuple(i for i, mode in enumerate(modes) if mode in ("full", "partial", "reuse"))
        self.partial = tuple(i for i in self.touched if modes[i] == "partial")
        self.scored = tuple(i for i in plan.scored_by_attention if modes[i] == "full")
        self.attentions: dict[int, _AttentionParts] = {}

    def run(self) -> StepGraph:
        caches = {i: self._placeholder(f"cache_{i}") for i in self.touched}
        scores = {i: self._placeholder(f"score_{i}") for i in self.scored}
        rows = {i: self._placeholder(f"rows_{i}") for i in self.partial}
        for i in self.scored:
            self._write(scores[i], self._base_score(i))
        merges: dict[int, tuple[fx.Node, fx.Node]] = {}
        for i in self.touched:
            output = self.nodes[self.plan.sites[i].output]
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
            fresh = restrict(output, 1)
            if fresh is None:
                raise AssertionError(f"{output} is [batch, tokens, channels] and can be gathered itself")
            scattered.args = (scattered.args[0], [rows[site]], fresh)
            needed |= _ancestors(restrict.gathered, stop=set())
            fresh_nodes[site] = frozenset(node.name for node in restrict.created)
        return fresh_nodes

    def _base_score(self, index: int) -> fx.Node:
        """Insert the score of a site's tokens behind the attention that judges them; [B, N]."""
        site, weights = self.plan.sites[index], self.plan.policies[index].scores
        if site.influence is None:
            raise AssertionError("plan.scored_by_attention lists sites with an attention only")
        parts = self._attention_parts(site.influence)
        operands = [operand for operand in parts.tensors if operand is not None]
        with self.graph.inserting_before(parts.behind):
            return _inline(self.graph, _score_function(weights, parts.scale, len(operands) == 4), operands)

    def _attention_parts(self, site: int) -> _AttentionParts:
        """Query, key, value and, where a fused kernel returns it, the row log-sum-exp of an attention."""
        if site not in self.attentions:
            attention = self.nodes[self.plan.sites[site].anchor]
            query, key, value = _operands(attention)
            scale = _argument(attention, "scale")
            logsumexp = self._fuse(attention) if _returns_logsumexp(attention) else None
            behind = (logsumexp or attention).next
            self.attentions[site] = _AttentionParts((query, key, value, logsumexp), scale, behind)
        return self.attentions[site]

    def _fuse(self, attention: fx.Node) -> fx.Node:
        """Call the CPU kernel that scaled_dot_product_attention would pick, and return its row log-sum-exp [B, H, N]."""
        keywords = {"scale": _argument(attention, "scale")}
        kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
        output, logsumexp = kernel(*(operand.meta["val"] for operand in _operands(attention)), **keywords)
        with self.graph.inserting_after(attention):
            fused = self.graph.call_function(kernel, attention.args[:3], keywords)
        with self.graph.inserting_after(fused):
            second = self.graph.call_function(operator.getitem, (fused, 1))
            first = self.graph.call_function(operator.getitem, (fused, 0))
        first.meta, second.meta = {**attention.meta, "val": output}, {"val": logsumexp}
        attention.replace_all_uses_with(first)
        return second


@dataclass(frozen=True)
class _AttentionParts:
    tensors: tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]
    scale: float | None
    behind: fx.Node


class _Restriction:
    """Copies of nodes that work on the fresh tokens only. ``rows`` [B, K] index the flattened [B * N] tokens.

    Restricted values keep their rank, with K in the place of N, so that every other operand still broadcasts.
    """

    def __init__(self, graph: fx.Graph, rows: fx.Node, before: fx.Node, needed: set[fx.Node], batch: int) -> None:
        self._graph, self._rows, self._before, self._needed, self._batch = graph, rows, before, needed, batch
        self._done: dict[tuple[fx.Node, int], fx.Node | None] = {}
        self.created: list[fx.Node] = []
        self.gathered: list[fx.Node] = []

    def __call__(self, node: fx.Node, axis: int) -> fx.Node | None:
        """``node`` restricted along ``axis``; None if that is impossible, so that its user has to be gathered."""
        if (node, axis) not in self._done:
            restricted = None if node in self._needed else self._recompute(node, axis)
            self._done[node, axis] = restricted if restricted is not None else self._gather(node, axis)
        return self._done[node, axis]

    def _recompute(self, node: fx.Node, axis: int) -> fx.Node | None:
        operands = tokenwise.token_operands(node, axis)
        if operands is None:
            return None
        replaced: dict[fx.Node, fx.Node] = {}
        for operand, operand_axis in operands.items():
            restricted = self(operand, operand_axis)
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

    def _gather(self, node: fx.Node, axis: int) -> fx.Node | None:
        """Take the fresh tokens out of a whole tensor; None if it has no [batch, tokens] layout."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or (value.dim() > 1 and axis and value.shape[0] not in (1, self._batch)):
            return None
        call, tokens = self._graph.call_function, value.shape[axis]
        with self._graph.inserting_before(self._before):
            whole, at = (call(aten.unsqueeze.default, (node, 0)), 1) if axis == 0 else (node, axis)
            whole = call(aten.transpose.int, (whole, 1, at)) if at != 1 else whole
            shape = list(value.shape) if axis else [1, *value.shape]
            shape[1], shape[at] = shape[at], shape[1]
            rows = self._rows if shape[0] == self._batch else call(aten.remainder.Scalar, (self._rows, tokens))
            flat = call(aten.reshape.default, (whole, [shape[0] * tokens, *shape[2:]]))
            taken = call(aten.index.Tensor, (flat, [rows]))
            taken = call(aten.transpose.int, (taken, 1, at)) if at != 1 else taken
        self.gathered.append(node)
        return taken


def _score_function(weights: Scores, scale: float | None, fused: bool) -> Callable[..., Tensor]:
    """The part of a site's score that is known once its attention has run, as a function to trace."""

    def base_score(query: Tensor, key: Tensor, value: Tensor, logsumexp: Tensor | None = None) -> Tensor:
        terms = []
        if weights.self_attention:
            terms.append(weights.self_attention * select.influence(query, key, scale, logsumexp if fused else None))
        if weights.value_norm:
            terms.append(weights.value_norm * select.feature_norm(value))
        if weights.key_norm:
            terms.append(weights.key_norm * select.feature_norm(key))
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    return base_score


def _inline(graph: fx.Graph, function: Callable[..., Tensor], operands: Sequence[fx.Node]) -> fx.Node:
    """Trace ``function`` over the operands' fake values and copy its nodes to the insertion point."""
    traced = make_fx(function, tracing_mode="fake")(*(operand.meta["val"] for operand in operands))
    inputs = traced.graph.find_nodes(op="placeholder")
    result = graph.graph_copy(traced.graph, dict(zip(inputs, operands, strict=True)))
    if not isinstance(result, fx.Node):
        raise TypeError(f"expected one tensor, got {result!r}")
    return result


def _returns_logsumexp(attention: fx.Node) -> bool:
    """Whether the CPU flash kernel computes exactly this attention: no mask, no dropout, equal heads."""
    query, key, value = (operand.meta["val"] for operand in _operands(attention))
    plain = all(_argument(attention, name) in (None, False, 0.0) for name in ("attn_mask", "dropout_p", "is_causal"))
    return bool(query.device.type == "cpu" and plain and query.shape[1] == key.shape[1] and query.shape[-1] == value.shape[-1])


def _operands(attention: fx.Node) -> list[fx.Node]:
    """Query, key and value."""
    return [operand for operand in attention.args[:3] if isinstance(operand, fx.Node)]


def _has_effect(node: fx.Node) -> bool:
    """Whether dead-code elimination has to leave a node that nobody uses: inputs, outputs and writes."""
    return node.op in ("placeholder", "output") or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


def _argument(node: fx.Node, name: str) -> Any:
    """The value of a named argument, however it was passed; None if it was left out."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    position = next(i for i, argument in enumerate(schema) if argument.name == name)
    return node.args[position] if position < len(node.args) else None


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
