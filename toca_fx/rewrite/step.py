"""Plan -> step graphs: the model's graph with cached sites replaced, for one combination of modes.

    full      out = module(x)                                  cache <- out           score <- base_score(q, k, v)
    partial   out = scatter(cache, rows, module(x[rows]))      cache <- out
    reuse     out = cache                                      (the module and its projections are dead code)
    compute   unchanged

Modules that share a cache (``cache.grain: block``) are replaced together:

    full      after = module_2(module_1(stream))               cache <- after - stream
    reuse     after = stream + cache

Whatever else a site remembers from step to step is treated as its output is: the keys and values of
an attention whose queries are computed for fresh tokens only, and the entropies of a
cross-attention. K, the number of rows, is the size of an index tensor: one graph serves every K.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from toca_fx.graph.ops import aten
from toca_fx.graph.stream import root
from toca_fx.graph.tokenwise import Tokens
from toca_fx.kernels import influence as scoring
from toca_fx.match.anchors import Attention, attention_at, attention_scale
from toca_fx.plan import buffers
from toca_fx.plan.plan import Modes, Plan
from toca_fx.rewrite.restrict import Restriction
from toca_fx.runtime.selector import Spatial, ranked

SpatialOf = Callable[[int], Spatial | None]


@dataclass(frozen=True)
class StepGraph:
    """A rewritten graph and how to call it.

    Inputs, in order: the captured graph's inputs at positions ``kept``, then the tensors ``names``
    (see ``buffers``). ``fresh_nodes[i]`` names the nodes that work on the fresh tokens of site i
    only (for counting FLOPs).
    """

    module: fx.GraphModule
    modes: Modes
    kept: tuple[int, ...]
    names: tuple[str, ...]
    fresh_nodes: dict[int, frozenset[str]]


def rewrite(
    source: fx.GraphModule,
    plan: Plan,
    modes: Modes,
    *,
    shared: bool = False,
    spatial_of: SpatialOf = lambda site: None,
    hoisted: Sequence[str] = (),
) -> StepGraph:
    """Build the graph of a step on which site i is in ``modes[i]``. ``source`` is not changed.

    ``shared`` says that both halves of the batch share one selection; ``spatial_of`` gives the
    spatial bonus of a site. Both concern sites that select within the step, and ``shared`` the
    entropies too. The values of the nodes ``hoisted`` are given. A step that scores an attention on
    a GPU is told whether anybody will read the scores (see ``buffers``).
    """
    module = fx.GraphModule(source, copy.deepcopy(source.graph))
    return _Rewriter(module, plan, modes, shared, spatial_of, hoisted).run()


@dataclass(frozen=True)
class _Merge:
    """``scattered`` puts the fresh part of ``value`` into what the site remembers of it,
    ``buffer``.
    """

    site: int
    value: fx.Node
    buffer: fx.Node
    scattered: fx.Node


class _Rewriter:
    """Turns a copy of the model's graph into one step graph; used once."""

    def __init__(
        self,
        module: fx.GraphModule,
        plan: Plan,
        modes: Modes,
        shared: bool,
        spatial_of: SpatialOf,
        hoisted: Sequence[str],
    ) -> None:
        self.module, self.graph, self.plan, self.modes = module, module.graph, plan, modes
        self.shared, self.spatial_of = shared, spatial_of
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.inputs = self.graph.find_nodes(op="placeholder")
        self.last_input = self.inputs[-1]
        self.end = next(iter(self.graph.find_nodes(op="output")))
        self.names: dict[str, fx.Node] = {}
        for name in hoisted:
            self.nodes[name].replace_all_uses_with(
                self._buffer(f"hoisted:{name}", self.nodes[name])
            )
        self.attentions = {
            site.anchor: attention_at(self.nodes[site.anchor])
            for site in plan.sites
            if site.kind != "mlp"
        }
        self.influences: dict[str, fx.Node] = {}
        self.entropies: dict[int, fx.Node] = {}
        self.merges: list[_Merge] = []

    def run(self) -> StepGraph:
        for i in self.plan.entropies:
            if self.modes[i] != "reuse":
                self.entropies[i] = self._entropy(i)
        for i in self.plan.scored_by_attention:
            if self.plan.judges(i, self.modes):
                self._write(f"score:{i}", self._base_score(i))
        for run in self.plan.runs:
            self._share(run)
        for i, mode in enumerate(self.modes):
            for name, node in self._remembered(i):
                if mode == "partial":
                    self.merges.append(self._merge(i, name, node))
                elif mode == "reuse":
                    node.replace_all_uses_with(self._as(node, self._buffer(name, node), after=node))
                else:
                    self._write(name, node)
        self._return_copies()
        rows = self._rows()
        fresh_nodes = self._compute_fresh(rows)
        # FX keeps seeded operators alive, attention among them for its optional dropout.
        self.graph.eliminate_dead_code(is_impure_node=_has_effect)
        kept = tuple(position for position, node in enumerate(self.inputs) if node.users)
        names = tuple(name for name, node in self.names.items() if node.users)
        for node in (*self.inputs, *self.names.values()):
            if not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        self.module.recompile()
        return StepGraph(self.module, self.modes, kept, names, fresh_nodes)

    def _return_copies(self) -> None:
        """What the model returns must not be a buffer, which later steps write to."""
        buffers = set(self.names.values())
        for returned in self.end.all_input_nodes:
            if root(returned) in buffers:
                with self.graph.inserting_before(self.end):
                    copied = self.graph.call_function(aten.clone.default, (returned,))
                self.end.replace_input_with(returned, copied)

    def _remembered(self, index: int) -> list[tuple[str, fx.Node]]:
        """What a site keeps from step to step: buffer and node, upstream first."""
        site, mode = self.plan.sites[index], self.modes[index]
        found: list[tuple[str, fx.Node]] = []
        peers = [
            self.modes[i] for i in self.plan.remembering if self.plan.sites[i].anchor == site.anchor
        ]
        if index in self.plan.remembering and (mode != "reuse" or "partial" in peers):
            found += [
                (f"keys:{index}:{k}", self.nodes[name]) for k, name in enumerate(site.projections)
            ]
        if index in self.entropies:
            found.append((f"entropy:{index}", self.entropies[index]))
        if mode != "compute" and not any(index in run for run in self.plan.runs):
            found.append((f"cache:{index}", self.nodes[site.output]))
        return found

    def _share(self, run: tuple[int, ...]) -> None:
        """One cache for what all sites of ``run`` add to the stream."""
        name, stream, residual = (
            f"cache:{run[0]}",
            self.nodes[self.plan.sites[run[0]].stream],
            self.plan.sites[run[-1]].residual,
        )
        end = self.nodes[residual]
        buffer = self._buffer(name, end)
        if self.modes[run[0]] == "reuse":
            added = self._as(end, buffer, after=end)
            with self.graph.inserting_after(end if added is buffer else added):
                total = self.graph.call_function(aten.add.Tensor, (stream, added))
            total.meta["val"] = stream.meta["val"] + added.meta["val"]
            # The type of the stream may change along the run.
            after = self._as(end, total, after=total)
            end.replace_all_uses_with(after)
            self.nodes[residual] = after
        else:
            with self.graph.inserting_after(end):
                added = self.graph.call_function(aten.sub.Tensor, (end, stream))
            added.meta["val"] = end.meta["val"] - stream.meta["val"]
            self._write(name, added)

    def _buffer(self, name: str, like: fx.Node | None = None) -> fx.Node:
        if name not in self.names:
            with self.graph.inserting_after(self.last_input):
                self.names[name] = self.last_input = self.graph.placeholder(name.replace(":", "_"))
            if like is not None:
                value: Tensor = like.meta["val"]
                self.names[name].meta["val"] = value.to(
                    buffers.dtype_of(self.plan, name, value.dtype)
                )
        return self.names[name]

    def _as(self, like: fx.Node, node: fx.Node, *, after: fx.Node) -> fx.Node:
        """``node`` in the dtype of ``like``."""
        dtype = like.meta["val"].dtype
        if node.meta["val"].dtype == dtype:
            return node
        with self.graph.inserting_after(after):
            converted = self.graph.call_function(aten.to.dtype, (node, dtype))
        converted.meta["val"] = node.meta["val"].to(dtype)
        return converted

    def _write(self, name: str, value: fx.Node) -> None:
        """One trailing copy per buffer: inductor turns it into the in-place update itself."""
        target = self._buffer(name, value)
        with self.graph.inserting_before(self.end):
            self.graph.call_function(aten.copy_.default, (target, value))

    def _merge(self, site: int, name: str, value: fx.Node) -> _Merge:
        """Put scatter(buffer, rows, <fresh>) in the place of ``value``; rows and <fresh> are filled
        in later.
        """
        sizes = list(value.meta["val"].shape)
        buffer = self._buffer(name, value)
        with self.graph.inserting_after(value):
            flat = self.graph.call_function(
                aten.view.default, (buffer, [sizes[0] * sizes[1], *sizes[2:]])
            )
        with self.graph.inserting_after(flat):
            scattered = self.graph.call_function(aten.index_put.default, (flat, [], value))
        with self.graph.inserting_after(scattered):
            kept = self.graph.call_function(aten.view.default, (scattered, sizes))
        kept.meta["val"] = buffer.meta["val"]
        merged = self._as(value, kept, after=kept)
        value.replace_all_uses_with(merged, delete_user_cb=lambda user: user is not scattered)
        if self.entropies.get(site) is value:
            self.entropies[site] = merged
        self._write(name, kept)
        return _Merge(site, value, buffer, scattered)

    def _rows(self) -> dict[int, fx.Node]:
        """The fresh tokens of each partial site: given, or chosen in the graph."""
        inside = self.plan.inside(self.modes)
        partial = dict.fromkeys(merge.site for merge in self.merges)
        return {i: self._select(i) if i in inside else self._take(i) for i in partial}

    def _take(self, index: int) -> fx.Node:
        """The best tokens of an order that was made ahead of the step; [B, K] rows."""
        order, ranks = self._buffer(f"order:{index}"), self._buffer(f"ranks:{index}")
        with self.graph.inserting_after(self.last_input):
            return self.graph.call_function(aten.index_select.default, (order, 1, ranks))

    def _select(self, index: int) -> fx.Node:
        """Choose within the step, once the cross-attention has run; [B, K] rows."""
        site, weight = self.plan.sites[index], self.plan.policies[index].scores.cross_attention
        entropy = self.entropies[site.entropy or 0]
        known = self._buffer(f"known:{index}", entropy)
        ranks = self._buffer(f"ranks:{index}")
        batch, tokens, _ = site.shape
        spatial = self.spatial_of(index)
        # As soon as the cross-attention has run: keys and values of the site itself may be merged
        # by these rows.
        with self.graph.inserting_before(entropy.next):
            order = _inline(
                self.graph,
                lambda known, entropy: ranked(known, entropy, weight, self.shared, spatial),
                (known, entropy),
            )
            chosen = self.graph.call_function(aten.index_select.default, (order, 1, ranks))
            blank = self.graph.call_function(
                aten.zeros_like.default, (known,), {"dtype": torch.bool}
            )
            picked = self.graph.call_function(aten.scatter.value, (blank, 1, chosen, True))
            if batch > 1:
                device = entropy.meta["val"].device
                first = self.graph.call_function(
                    aten.arange.start_step, (0, batch * tokens, tokens), {"device": device}
                )
                chosen = self.graph.call_function(
                    aten.add.Tensor,
                    (chosen, self.graph.call_function(aten.unsqueeze.default, (first, 1))),
                )
        picked.meta["val"] = torch.empty_like(entropy.meta["val"], dtype=torch.bool)
        self._write(f"picked:{index}", picked)
        return chosen

    def _compute_fresh(self, rows: dict[int, fx.Node]) -> dict[int, frozenset[str]]:
        """Restrict each partial site's computation to its fresh tokens, up to nodes that are needed
        whole anyway.
        """
        writes = [node for node in self.graph.nodes if node.target is aten.copy_.default]
        needed = _ancestors([self.end, *writes], stop={merge.scattered for merge in self.merges})
        # A stream that only fresh tokens read (a text that ends before the last block) is summed up
        # whole, block by block: for other tokens in every block, each would go back to the first.
        needed |= {self.nodes[site.residual] for site in self.plan.sites if site.residual}
        restrictions: dict[int, Restriction] = {}
        order = {node: position for position, node in enumerate(self.graph.nodes)}
        for merge in sorted(self.merges, key=lambda merge: order[merge.scattered]):
            value: Tensor = merge.value.meta["val"]
            if merge.site not in restrictions:
                restrictions[merge.site] = Restriction(
                    self.graph, rows[merge.site], needed, value.device
                )
            restrict = restrictions[merge.site]
            restrict.before = merge.scattered
            fresh = restrict(merge.value, Tokens(value.shape[0], value.shape[1]))
            if fresh is None:
                raise AssertionError(
                    f"{merge.value} is [batch, tokens, ...] and can be gathered itself"
                )
            kept = merge.buffer.meta["val"].dtype
            if kept != value.dtype:
                with self.graph.inserting_before(merge.scattered):
                    fresh = self.graph.call_function(aten.to.dtype, (fresh, kept))
            merge.scattered.args = (merge.scattered.args[0], [rows[merge.site]], fresh)
            needed |= _ancestors(restrict.gathered, stop={other.scattered for other in self.merges})
        return {
            site: frozenset(node.name for node in restrict.created)
            for site, restrict in restrictions.items()
        }

    def _base_score(self, index: int) -> fx.Node:
        """Insert the score of a site's tokens that is known once the attention that judges them has
        run; [B, N].
        """
        site, weights = self.plan.sites[index], self.plan.policies[index].scores
        if site.influence is None:
            raise AssertionError("plan.scored_by_attention lists sites with an attention only")
        source = self.plan.sites[site.influence]
        attention = self._attention(source.anchor)
        segment = functools.partial(
            scoring.of_segment, start=source.segment or 0, count=site.tokens
        )

        def norm_of(operand: fx.Node, transposed: bool) -> fx.Node:
            def norm(feature: Tensor) -> Tensor:
                return segment(
                    scoring.feature_norm(_heads(feature, attention, site.shape[0], transposed))
                )

            return _inline(self.graph, norm, (operand,))  # type: ignore[no-any-return]

        nodes: list[tuple[float, fx.Node]] = []
        with self.graph.inserting_before(self.end):
            if weights.value_norm:
                nodes.append((weights.value_norm, norm_of(attention.value, False)))
            if weights.key_norm:
                nodes.append(
                    (weights.key_norm, norm_of(attention.key, attention.weights is not None))
                )
        if weights.self_attention:
            influence = self._influence(source.anchor, site.shape[0])
            with self.graph.inserting_before(self.end):
                nodes.append((weights.self_attention, _inline(self.graph, segment, (influence,))))
        with self.graph.inserting_before(self.end):
            scaled = [
                self.graph.call_function(aten.mul.Tensor, (node, weight)) for weight, node in nodes
            ]
            total = functools.reduce(
                lambda a, b: self.graph.call_function(aten.add.Tensor, (a, b)), scaled
            )
        total.meta["val"] = nodes[0][1].meta["val"]
        return total

    def _attention(self, anchor: str) -> Attention:
        attention = self.attentions[anchor]
        if attention is None:
            raise AssertionError(f"{anchor} is no attention")
        return attention

    def _influence(self, anchor: str, batch: int) -> fx.Node:
        """Make an attention return how much each key is attended to; once, however many sites it
        judges.
        """
        if anchor not in self.influences:
            attention, every = self._attention(anchor), self._every(anchor)
            if attention.output.target is aten.scaled_dot_product_attention.default:
                told = {"read": self._told(attention.output)} if _on_gpu(attention.output) else {}
                self.influences[anchor] = self._replace(
                    anchor, functools.partial(scoring.attention_and_influence, every=every), told
                )
            else:
                of_map = (
                    scoring.map_influence if attention.weights is not None else scoring.influence
                )
                self.influences[anchor] = self._beside(
                    attention, batch, functools.partial(of_map, every=every)
                )
        return self.influences[anchor]

    def _every(self, anchor: str) -> int:
        """Every how many queries of an attention are looked at: as the most demanding of the sites
        that it judges wants it.
        """
        sites, policies = self.plan.sites, self.plan.policies
        judged = [
            i
            for i in self.plan.scored_by_attention
            if sites[sites[i].influence or 0].anchor == anchor
        ]
        return min(policies[i].scores.every for i in judged if policies[i].scores.self_attention)

    def _told(self, attention: fx.Node) -> fx.Node:
        """The input that says whether the scores of this step will be read: on the CPU, where
        reading it waits for nothing.
        """
        node = self._buffer("read")
        node.meta["val"] = attention.meta["val"].new_zeros((), dtype=torch.bool, device="cpu")
        return node

    def _entropy(self, index: int) -> fx.Node:
        """Make a cross-attention return the entropy of each query."""
        site, share = self.plan.sites[index], 0.5 if self.shared else 1.0
        attention = self._attention(site.anchor)
        if attention.output.target is aten.scaled_dot_product_attention.default:
            return self._replace(
                site.anchor, functools.partial(scoring.attention_and_entropy, share=share)
            )
        of_map = scoring.map_entropy if attention.weights is not None else scoring.entropy
        return self._beside(attention, site.shape[0], functools.partial(of_map, share=share))

    def _replace(
        self,
        anchor: str,
        function: Callable[..., Any],
        further: Mapping[str, fx.Node] | None = None,
    ) -> fx.Node:
        """Put ``function``, which returns output and score, in the place of an attention; returns
        the score's node.

        It takes what the attention takes, and what is ``further`` given.
        """
        attention = self._attention(anchor).output
        score: fx.Node
        with self.graph.inserting_before(attention):
            output, score = _inline(
                self.graph, function, attention.args, {**attention.kwargs, **(further or {})}
            )
        attention.replace_all_uses_with(output)
        if self.nodes[anchor] is attention:  # the cached output itself, where no projection follows
            self.nodes[anchor] = output
        return score

    def _beside(self, attention: Attention, batch: int, function: Callable[..., Tensor]) -> fx.Node:
        """Compute a score from the map in the graph, or from queries and keys beside an attention
        that stays as it is.
        """
        with self.graph.inserting_before(attention.output):
            if attention.weights is not None:
                of_map = lambda weights: function(_heads(weights, attention, batch, False))  # noqa: E731
                return _inline(self.graph, of_map, (attention.weights,))  # type: ignore[no-any-return]
            given = attention_scale(attention.output)

            def score(query: Tensor, key: Tensor) -> Tensor:
                scale = query.shape[-1] ** -0.5 if given is None else given
                return function(
                    _heads(query, attention, batch, False),
                    _heads(key, attention, batch, False),
                    scale,
                )

            return _inline(self.graph, score, (attention.query, attention.key))  # type: ignore[no-any-return]


def _heads(operand: Tensor, attention: Attention, batch: int, transposed: bool) -> Tensor:
    """An operand of an attention as [B, heads, tokens, width], whatever its layout."""
    if attention.layout == "bnhd":
        return operand.transpose(1, 2)
    operand = operand.transpose(-1, -2) if transposed else operand
    return operand if operand.dim() == 4 else operand.reshape(batch, -1, *operand.shape[1:])


def _inline(graph: fx.Graph, function: Callable[..., Any], args: Any, kwargs: Any = None) -> Any:
    """Trace ``function`` over the fake values of nodes and copy it to the insertion point; returns
    its output nodes.
    """
    nodes: list[fx.Node] = []
    fx.node.map_arg((args, kwargs or {}), nodes.append)

    def on_values(*values: Any) -> Any:
        by_node = dict(zip(nodes, values, strict=True))
        args_, kwargs_ = fx.node.map_arg((args, kwargs or {}), by_node.__getitem__)
        return function(*args_, **kwargs_)

    # The tracer knows tensors by identity, and nodes may share one fake value.
    values = [node.meta["val"].detach() for node in nodes]
    traced = make_fx(on_values, tracing_mode="fake", pre_dispatch=True)(*values)
    inputs = traced.graph.find_nodes(op="placeholder")
    return graph.graph_copy(traced.graph, dict(zip(inputs, nodes, strict=True)))


def _on_gpu(node: fx.Node) -> bool:
    return bool(node.meta["val"].device.type == "cuda")


def _has_effect(node: fx.Node) -> bool:
    """Whether dead-code elimination has to leave a node that nobody uses: inputs, outputs and
    writes.
    """
    return node.op in ("placeholder", "output") or (
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


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
