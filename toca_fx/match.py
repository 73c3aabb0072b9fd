"""Find attention and MLP modules in a pre-dispatch ATen graph. Pure: nothing is changed.

A match starts at an anchor and walks outwards:

    attention   scaled_dot_product_attention(q, k, v); back to the linears that made q and k (their inputs tell
                self-, cross- and joint attention apart), forward through the output projection
    mlp         linear -> activation, plain or gated -> linear

Either counts as a site only if its output is added to a residual stream that it also reads, inside a numbered
block: ``stream + gate * module(norm(stream))``. So timestep embedders and caption projections are not sites. What is
cached is the module's output before the gate, because the gate depends on the timestep (ToCa, section 3).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import fx

aten = torch.ops.aten

ACTIVATIONS = frozenset(
    {
        aten.gelu.default,
        aten.silu.default,
        aten.relu.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.mish.default,
        aten.elu.default,
        aten.leaky_relu.default,
        aten.hardswish.default,
    }
)
_ADDS = frozenset({aten.add.Tensor, operator.add})
_MULS = frozenset({aten.mul.Tensor, operator.mul})
# Between the last linear of a module and its gate: nothing here mixes tokens or depends on the timestep.
_PASS_THROUGH = frozenset(
    {
        aten.transpose.int,
        aten.permute.default,
        aten.reshape.default,
        aten.view.default,
        aten.flatten.using_ints,
        aten.contiguous.default,
        aten.clone.default,
        aten.to.dtype,
        aten.dropout.default,
    }
)
_BETWEEN_LINEARS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem})


@dataclass(frozen=True)
class Site:
    """One matched module. Nodes are named, not referenced, so that a site is plain data.

    ``output`` is the node whose value is cached, [batch, tokens, channels]. ``anchor`` is the attention operator, or the
    first linear of an MLP. ``judges`` tells that an attention's operands are [batch, heads, tokens, width], so that its map
    can score the tokens of its output (it cannot in windows, say). ``influence`` is the index, among the sites, of the
    attention whose map scores this site's tokens: the nearest that judges, before it in the same block.
    """

    kind: str
    path: str
    layer: int
    block: str
    output: str
    anchor: str
    shape: tuple[int, int, int]
    influence: int | None = None
    judges: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens of the cached output."""
        return self.shape[1]


@dataclass(frozen=True)
class NearMiss:
    """Something that looks like a site and is none, and why."""

    kind: str
    path: str
    reason: str


@dataclass(frozen=True)
class Matches:
    """All sites of a graph in execution order, and what came close."""

    sites: tuple[Site, ...]
    misses: tuple[NearMiss, ...]


def match(graph: fx.Graph) -> Matches:
    """Match every attention and MLP of ``graph``, which comes from ``trace.to_aten``."""
    flow = nx.DiGraph((operand, node) for node in graph.nodes for operand in node.all_input_nodes)
    sites: list[Site] = []
    misses: list[NearMiss] = []
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            found: Site | NearMiss | None = _attention(node, flow)
        elif node.target is aten.linear.default:
            found = _mlp(node, flow)
        else:
            continue
        if isinstance(found, NearMiss):
            misses.append(found)
        elif found is not None:
            sites.append(found)
    return Matches(tuple(_with_influence(sites)), tuple(misses))


def _attention(anchor: fx.Node, flow: nx.DiGraph) -> Site | NearMiss | None:
    query, key = (set(_source_linears(anchor.args[position])) for position in (0, 1))
    if not query or not key:
        return NearMiss("attention", anchor.meta["path"], "query or key does not come from a linear projection")
    query_inputs, key_inputs = ({_projected(linear) for linear in linears} for linears in (query, key))
    kind = "self_attention" if len(query_inputs) == 1 else "joint_attention"
    if query_inputs != key_inputs:
        kind = "cross_attention"
    found = _site(kind, anchor, anchor.meta["stack"], query, _module_output(anchor, projections=1), flow)
    if isinstance(found, Site) and kind != "cross_attention":
        batch, tokens, _ = found.shape
        shapes = [operand.meta["val"].shape for operand in anchor.args[:2] if isinstance(operand, fx.Node)]
        return replace(found, judges=all(len(shape) == 4 and (shape[0], shape[2]) == (batch, tokens) for shape in shapes))
    return found


def _mlp(last: fx.Node, flow: nx.DiGraph) -> Site | NearMiss | None:
    """``last`` is a linear; a match if an activation, plain or gated, lies between it and earlier linears."""
    first, activated = _before_activation(last.args[0])
    if not first or not activated:
        return None
    path = _common_path([*first, last])
    if len({linear.args[0] for linear in first}) != 1:
        return NearMiss("mlp", path[-1] if path else "", "the gated branches read different inputs")
    return _site("mlp", first[0], path, set(first), _module_output(last, projections=0), flow)


def _site(
    kind: str, anchor: fx.Node, path: tuple[str, ...], readers: set[fx.Node], output: fx.Node, flow: nx.DiGraph
) -> Site | NearMiss | None:
    where = path[-1] if path else anchor.meta["path"]
    block, layer = _numbered_block(where)
    stream = _residual_stream(output)
    upstream = set().union(*(nx.ancestors(flow, reader) for reader in readers))
    if stream is None or not any(node in upstream for node in stream):
        # Embedders are linear-activation-linear too; only those inside a block are worth a line in a report.
        return NearMiss(kind, where, "its output is not added to the stream that it reads") if layer is not None else None
    if layer is None:
        return NearMiss(kind, where, "it lies outside the numbered blocks (no index in its module path)")
    shape = output.meta["val"].shape
    if len(shape) != 3:
        return NearMiss(kind, where, f"its output has shape {tuple(shape)}, not [batch, tokens, channels]")
    return Site(kind, where, layer, block, output.name, anchor.name, tuple(shape))


def _source_linears(value: object) -> Iterator[fx.Node]:
    """The nearest linears upstream of a query or key: through views, norms, rotary embeddings and scaling."""
    pending, seen = [value], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            yield node
        else:
            pending.extend(node.all_input_nodes)


def _projected(linear: fx.Node) -> object:
    """What a projection reads; of a low-rank pair (LoRA), what the first of the two reads."""
    source = linear.args[0]
    while isinstance(source, fx.Node) and source.target is aten.linear.default:
        source = source.args[0]
    return source


def _before_activation(value: object) -> tuple[list[fx.Node], bool]:
    """Linears behind an activation, and whether there was one: back through pointwise operators and splits only."""
    linears: list[fx.Node] = []
    activated = False
    pending, seen = [value], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            linears.append(node)
        elif node.op != "call_function":
            return [], False
        elif node.target in ACTIVATIONS:
            activated = True
            pending.extend(node.all_input_nodes)
        elif node.target in _MULS or node.target in _PASS_THROUGH or node.target in _BETWEEN_LINEARS:
            pending.extend(node.all_input_nodes)
        else:
            return [], False
    return linears, activated


def _module_output(node: fx.Node, projections: int) -> fx.Node:
    """Walk forward to the last node before the gate or the residual add, through at most ``projections`` linears."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is aten.linear.default and user.args[0] is node and projections:
            projections -= 1
        elif user.target is aten.div.Tensor and user.args[0] is node:
            if isinstance(user.args[1], fx.Node):
                break
        elif user.target not in _PASS_THROUGH:
            break
        node = user
    return node


def _residual_stream(output: fx.Node) -> tuple[fx.Node, ...] | None:
    """The other operands of the add that ``output`` reaches, directly or through gates; None if it reaches none."""
    node = output
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in _ADDS:
            return tuple(operand for operand in user.all_input_nodes if operand is not node)
        if user.target not in _MULS and user.target not in _PASS_THROUGH:
            return None
        node = user
    return None


def _common_path(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The chain of modules that all ``nodes`` lie in, outermost first."""
    common: tuple[str, ...] | None = None
    for node in nodes:
        stack = node.meta["stack"]
        if common is None:
            common = stack
        else:
            length = next((i for i, (a, b) in enumerate(zip(common, stack, strict=False)) if a != b), min(len(common), len(stack)))
            common = common[:length]
    return common or ()


def _numbered_block(path: str) -> tuple[str, int | None]:
    """``transformer_blocks.3.ff`` -> ("transformer_blocks", 3): the outermost numbered module list."""
    parts = path.split(".")
    for position, part in enumerate(parts):
        if part.isdigit() and position:
            return ".".join(parts[:position]), int(part)
    return "", None


def _with_influence(sites: list[Site]) -> Iterator[Site]:
    for index, site in enumerate(sites):
        source = next(
            (
                earlier
                for earlier in range(index, -1, -1)
                if sites[earlier].judges
                and (sites[earlier].block, sites[earlier].layer) == (site.block, site.layer)
                and sites[earlier].shape[:2] == site.shape[:2]
            ),
            None,
        )
        yield replace(site, influence=source)
