"""Where the operands of an attention come from.

The questions are which streams it reads, and which of its rows, keys and values belong to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from toca_fx.graph import axes, tokenwise
from toca_fx.graph.ops import (
    RESHAPES,
    SAME,
    aten,
    is_constant,
    is_scale,
    linear_input,
    quantizer_of,
)
from toca_fx.graph.stream import Flow, passages, root
from toca_fx.graph.tokenwise import Tokens
from toca_fx.match.fused import Attention

# The same tensor in another shape or dtype, and not a part of it.
_RESHAPED = RESHAPES | SAME


def attention_kind(attention: Attention) -> str | None:
    """The kind of site: "self_attention", "cross_attention" or "joint_attention".

    None if query or key has no projection.
    """
    query, key = (list(_source_linears(node)) for node in (attention.query, attention.key))
    if query and is_constant(attention.key):
        return "cross_attention"  # to something learnt
    if not query or not key:
        return None
    query_inputs = {projected(linear) for linear in query}
    key_inputs = {projected(linear) for linear in key}
    if query_inputs != key_inputs:
        return "cross_attention"
    return "self_attention" if len(query_inputs) == 1 else "joint_attention"


def _source_linears(value: object) -> Iterator[fx.Node]:
    """The nearest linears upstream of a query or key.

    Views, norms, rotary embeddings and scaling may lie in between.
    """
    pending, seen = [value], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen or is_constant(node) or is_scale(node):
            continue
        seen.add(node)
        if linear_input(node) is not None:
            yield node
        else:
            pending.extend(node.all_input_nodes)


def projected(linear: fx.Node) -> fx.Node | None:
    """The input of a projection; for a low-rank pair (LoRA), that of the first of the two."""
    source = linear_input(linear)
    while source is not None and (earlier := linear_input(root(source))) is not None:
        source = earlier
    return unshaped(source)


@dataclass(frozen=True)
class Rows:
    """Which rows of an attention's map are the tokens of an output [batch, tokens, channels].

    They begin at ``segment``, in the map of each sample; those of all samples, one sample behind
    the other, are in one map if it is ``packed``.
    """

    segment: int
    packed: bool = False


def rows_of(
    attention: Attention, output: fx.Node, shape: tuple[int, int, int], flow: Flow
) -> Rows | None:
    """The rows of the queries that are the tokens of ``output`` [batch, tokens, channels].

    The queries behind them are other tokens. None if the queries are something else. Operands have
    four axes, or three, with the heads of a sample side by side in the first.
    """
    batch, count, _ = shape
    heads = axes.shape_of(attention.output)
    queries = _queries(attention)
    tokens = _followed(attention, output, Tokens(batch, count), flow)
    if tokens is None or tokens.axis != queries:
        return None
    # Without an axis of heads the map can be read only if the graph has it; so it can where a mask
    # that is not known keeps samples apart.
    has_map = attention.weights is not None
    if tokens.flat:
        readable = has_map or attention.output.target is aten.scaled_dot_product_attention.default
        alone = heads[0] == 1 if len(heads) == 4 else len(heads) == 3 and has_map
        whole = heads[queries] == batch * count and not tokens.tokens_first
        return Rows(0, packed=True) if readable and alone and whole else None
    if len(heads) == 4:
        # An axis of one position cannot be followed, nor does it have to be.
        samples: Tokens | None = replace(tokens, axis=0)
        if batch > 1:
            first = Tokens(count, batch, batch_axis=1, axis=0)
            samples = _followed(attention, output, first, flow)
        is_first = samples is not None and samples.axis == 0 and heads[0] == batch
        return Rows(tokens.offset) if is_first else None
    readable = len(heads) == 3 and has_map
    is_first = tokens.batch_axis == 0 and tokens.samples == heads[0]
    return Rows(tokens.offset) if readable and is_first else None


def _queries(attention: Attention) -> int:
    """The axis of an attention's result that has the queries."""
    return len(axes.shape_of(attention.output)) - 2 if attention.layout == "bhnd" else 1


def is_sequence_first(
    attention: Attention, output: fx.Node, shape: tuple[int, int, int], flow: Flow
) -> bool:
    """Whether an attention takes ``output`` for [tokens, batch, channels].

    Then queries lie along its first axis, and samples along its second.
    """
    rows, columns, _ = shape
    queries = _queries(attention)
    first = _followed(attention, output, Tokens(columns, rows, batch_axis=1, axis=0), flow)
    second = _followed(attention, output, Tokens(rows, columns), flow)
    return first is not None and second is not None and (first.axis, second.axis) == (queries, 0)


def _followed(attention: Attention, output: fx.Node, where: Tokens, flow: Flow) -> Tokens | None:
    """Where the positions at ``where`` of ``output`` lie in an attention's result.

    None if they cannot be followed there.
    """
    ends: set[Tokens] = set()
    pending, seen = [(output, where)], set()
    while pending:
        node, there = pending.pop()
        if (node, there) in seen:
            continue
        seen.add((node, there))
        if node is attention.output:
            ends.add(there)
            continue
        moved = tokenwise.segment(node, there)
        if moved is not None:
            pending.append(moved)
            continue
        carried = tokenwise.followed(node, there)
        if carried is None:
            return None
        pending += [one for one in carried.items() if flow.reaches(attention.output, one[0])]
    return next(iter(ends)) if len(ends) == 1 else None


def same_tokens(attention: Attention, shape: tuple[int, int, int], rows: Rows) -> bool:
    """Whether the keys are projections of the same tokens as the queries in ``rows``, in order."""
    queries = _queries(attention)
    batch, count, _ = shape
    # A key that is multiplied explicitly is transposed.
    keys = len(axes.shape_of(attention.output)) - 1 if attention.weights is not None else queries

    if rows.packed and axes.shape_of(attention.key)[keys] != batch * count:
        return False  # more keys than the tokens of all samples

    def read(operand: fx.Node, axis: int) -> set[tuple[fx.Node | None, Tokens]]:
        batch_axis = axis if rows.packed else 0
        return _read(operand, Tokens(batch, count, batch_axis, axis, rows.segment))

    return bool(read(attention.query, queries) & read(attention.key, keys))


def _read(operand: fx.Node, where: Tokens) -> set[tuple[fx.Node | None, Tokens]]:
    """The inputs of the projections behind a query or key, and where the tokens lie in them."""
    found: set[tuple[fx.Node | None, Tokens]] = set()
    pending, seen = [(operand, where)], set()
    while pending:
        node, there = pending.pop()
        if (node, there) in seen or is_constant(node) or is_scale(node):
            continue
        seen.add((node, there))
        moved = tokenwise.segment(node, there)
        carried = tokenwise.followed(node, there) or {}
        if linear_input(node) is not None:
            # Of tokens with an axis of their own it does not matter where the samples lie.
            found |= {
                (source, at if at.flat else replace(at, batch_axis=None, groups=1))
                for source, at in _unflattened(node, carried)
            }
        elif moved is not None:
            pending.append(moved)
        elif node.target is aten.cat.default and not carried:
            pending += _parts(node, there)
        else:
            pending += carried.items()
    return found


def _unflattened(linear: fx.Node, carried: tokenwise.Operands) -> Iterator[tuple[fx.Node, Tokens]]:
    """What a linear layer reads, out of few bits and in its own shape, and where the tokens lie."""
    read = linear_input(linear)
    for source, there in carried.items():
        node, where = source, there
        in_bits = quantizer_of(linear) is not None
        while in_bits or node.target in _RESHAPED:
            first = node.args[0]
            within = tokenwise.followed(node, where) or {}
            if not isinstance(first, fx.Node) or first not in within:
                break
            node, where = first, within[first]
            in_bits = in_bits and node is not read
        if not is_constant(source) and not is_scale(root(source)):
            yield node, where


def _parts(node: fx.Node, where: Tokens) -> Iterator[tuple[fx.Node, Tokens]]:
    """The parts of a concatenation along the tokens, each with its share of those at ``where``."""
    begin = 0
    parts: Any = node.args[0]
    for part in parts:
        end = begin + axes.shape_of(part)[where.axis]
        first, last = max(begin, where.offset), min(end, where.offset + where.count)
        if first < last:
            yield part, replace(where, offset=first - begin, count=last - first)
        begin = end


def unshaped(node: fx.Node | None) -> fx.Node | None:
    """The node that ``node`` is a copy of, perhaps in another shape or dtype."""
    while node is not None and node.target in _RESHAPED and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def projections_of(
    attention: Attention, shape: tuple[int, int, int], rows: Rows, flow: Flow
) -> tuple[str, ...]:
    """The nodes that hold keys and values of one stream, [batch, tokens, ...].

    They are the earliest that hold no queries; where there are none (one projection split along an
    axis in front of the tokens), those with the queries. Empty if keys or values cannot be
    followed.
    """
    batch, count, _ = shape
    axis = 2 if attention.layout == "bhnd" else 1
    names: dict[str, None] = {}
    for operand in (attention.key, attention.value):
        if len(axes.shape_of(operand)) != 4 or attention.weights is not None:
            return ()
        batch_axis = axis if rows.packed else 0
        region = _upstream(operand, Tokens(batch, count, batch_axis, axis, rows.segment))
        whole = [
            node
            for node, where in region.items()
            if where == Tokens(batch, count) and axes.shape_of(node)[:2] == (batch, count)
        ]
        ways = [node for node in passages(list(region)) if node in whole]
        apart = [node for node in ways if not flow.reaches(node, attention.query)]
        if not ways:
            return ()
        names[(apart or ways)[0].name] = None
    return tuple(names)


def _upstream(start: fx.Node, where: Tokens) -> dict[fx.Node, Tokens]:
    """The nodes that carry the tokens at ``where`` from their projections to ``start``.

    They are in order, each with where the tokens lie in it; tensors only. What has the tokens from
    elsewhere (positions that are given) is not among them, if there is a projection.
    """
    found: dict[fx.Node, Tokens] = {}
    pending = [(start, where)]
    while pending:
        node, there = pending.pop()
        if node in found or is_scale(node):
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
    ordered = [node for node in start.graph.nodes if node in found]
    made = {node for node in ordered if linear_input(node) is not None}
    for node in ordered:
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    return {
        node: found[node]
        for node in ordered
        if hasattr(node.meta.get("val"), "shape") and (node in made or not made)
    }
