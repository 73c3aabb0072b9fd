"""Where the operands of an attention come from: which streams it reads, and which of its rows, keys and values belong to one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from toca_fx import axes, tokenwise
from toca_fx.flow import Flow, passages, root
from toca_fx.patterns import Attention, aten, is_constant, linear_input
from toca_fx.tokenwise import Tokens

# Of one tensor in another shape or dtype; parts of it are something else.
_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default, aten.to.dtype})


def attention_kind(attention: Attention) -> str | None:
    """Which kind of site it is: "self_attention", "cross_attention" or "joint_attention"; None if query or key has no projection."""
    query, key = (list(_source_linears(node)) for node in (attention.query, attention.key))
    if query and is_constant(attention.key):
        return "cross_attention"  # to something learnt
    if not query or not key:
        return None
    query_inputs, key_inputs = ({projected(linear) for linear in linears} for linears in (query, key))
    if query_inputs != key_inputs:
        return "cross_attention"
    return "self_attention" if len(query_inputs) == 1 else "joint_attention"


def _source_linears(value: object) -> Iterator[fx.Node]:
    """The nearest linears upstream of a query or key: through views, norms, rotary embeddings and scaling."""
    pending, seen = [value], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen or is_constant(node):
            continue
        seen.add(node)
        if linear_input(node) is not None:
            yield node
        else:
            pending.extend(node.all_input_nodes)


def projected(linear: fx.Node) -> fx.Node | None:
    """What a projection reads; of a low-rank pair (LoRA), what the first of the two reads."""
    source = linear_input(linear)
    while source is not None and (earlier := linear_input(root(source))) is not None:
        source = earlier
    while source is not None and source.target in _RESHAPES and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return source


def segment_of(attention: Attention, output: fx.Node, shape: tuple[int, int, int], flow: Flow) -> int | None:
    """The query from which on an attention's queries are the tokens of ``output`` [batch, tokens, channels]; None if they are others."""
    batch, count, _ = shape
    ends: set[Tokens] = set()
    pending, seen = [(output, Tokens(batch, count))], set()
    while pending:
        node, where = pending.pop()
        if (node, where) in seen:
            continue
        seen.add((node, where))
        if node is attention.output:
            ends.add(where)
            continue
        moved = tokenwise.segment(node, where)
        if moved is not None:
            pending.append(moved)
            continue
        carried = axes.operands(node, where.axis)
        if carried is None:
            return None
        pending += [(operand, replace(where, axis=axis)) for operand, axis in carried.items() if flow.reaches(attention.output, operand)]
    if len(ends) != 1:
        return None
    (where,) = ends
    heads = axes.shape_of(attention.output)
    queries = len(heads) - 2 if attention.layout == "bhnd" else 1
    # Without an axis of heads only a map that is there can be read: samples and heads share an axis.
    samples = heads[0] == batch if len(heads) == 4 else attention.weights is not None and heads[0] % batch == 0
    return where.offset if where.axis == queries and samples else None


def projections_of(attention: Attention, shape: tuple[int, int, int], segment: int, flow: Flow) -> tuple[str, ...]:
    """Keys and values of one stream, [batch, tokens, ...], as early as they are apart from queries; empty if they cannot be followed.

    Where no such node is apart from queries (one projection split along an axis in front of the tokens), queries are remembered, too.
    """
    batch, count, _ = shape
    axis = 2 if attention.layout == "bhnd" else 1
    names: dict[str, None] = {}
    for operand in (attention.key, attention.value):
        if len(axes.shape_of(operand)) != 4 or attention.weights is not None:
            return ()
        region = _upstream(operand, Tokens(batch, count, axis=axis, offset=segment))
        whole = [node for node, where in region.items() if where == Tokens(batch, count) and axes.shape_of(node)[:2] == (batch, count)]
        ways = [node for node in passages(list(region)) if node in whole]
        apart = [node for node in ways if not flow.reaches(node, attention.query)]
        if not ways:
            return ()
        names[(apart or ways)[0].name] = None
    return tuple(names)


def _upstream(start: fx.Node, where: Tokens) -> dict[fx.Node, Tokens]:
    """The nodes that carry the tokens at ``where`` from their projections to ``start``, in order, and where in each; tensors only."""
    found: dict[fx.Node, Tokens] = {}
    pending = [(start, where)]
    while pending:
        node, there = pending.pop()
        if node in found:
            continue
        found[node] = there
        source = linear_input(node)
        if source is not None and linear_input(root(source)) is None:
            continue
        moved = tokenwise.segment(node, there)
        if moved is not None:
            pending.append(moved)
        else:
            pending += (tokenwise.operands(node, there) or {}).items()
    return {node: found[node] for node in start.graph.nodes if node in found and hasattr(node.meta.get("val"), "shape")}
