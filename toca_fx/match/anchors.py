"""What linear layers and attention look like in a pre-dispatch ATen graph, in all their spellings.

    linear      linear, addmm, or any product with a weight (einsum); packed low-bit weights;
                convolution with a kernel of one position
    attention   scaled_dot_product_attention; softmax(scale q k^T + mask) v by matmul, bmm or
                baddbmm (einsum is one of these after tracing), with a cap on the scores or sinks
                beside them; fused operators (``match.fused``)

A node is *constant* (``meta["constant"]``, set by ``capture.aten``) if it depends on the model's
parameters and buffers only.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import replace

from torch import fx

from toca_fx.graph import tokenwise
from toca_fx.graph.axes import shape_of
from toca_fx.graph.ops import (
    PRODUCTS,
    RELAYOUTS,
    SOFTMAXES,
    aten,
    is_cheap,
    operands,
)
from toca_fx.graph.tokenwise import Tokens
from toca_fx.match.fused import Attention, fused_at


def attention_at(node: fx.Node) -> Attention | None:
    """The attention whose result is ``node``, None if it is something else."""
    fused = fused_at(node)
    if fused is not None:
        return fused
    if node.target not in PRODUCTS or node.target is aten.baddbmm.default:
        return None
    weights, value = node.args[:2]
    softmax = next(_upstream(weights, SOFTMAXES, _is_relayout), None)
    if softmax is None or not isinstance(weights, fx.Node) or not isinstance(value, fx.Node):
        return None
    rank = len(shape_of(softmax))
    if softmax.args[1] not in (-1, rank - 1):
        return None
    product = _scores(softmax.args[0]) or _scores(_beside_sinks(softmax, weights))
    if product is None:
        return None
    query, key = product.args[-2:]
    if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
        return None
    return Attention(node, query, key, value, weights)


def _scores(value: object) -> fx.Node | None:
    """The product of queries and keys behind what goes into the softmax; None if there is none.

    Scaling, a cap and masks may lie between the two. A position bias can be a product as well: it
    is broadcast.
    """
    found = list(_upstream(value, PRODUCTS, is_cheap))
    if len(found) > 1 and isinstance(value, fx.Node):
        found = [node for node in found if shape_of(node).numel() == shape_of(value).numel()]
    return found[0] if found and not _is_turned(value, found[0]) else None


def _is_turned(value: object, product: fx.Node) -> bool:
    """Whether the last axis of ``value`` is that of the rows of ``product``.

    What is called its right operand are the queries then.
    """
    pending: list[tuple[object, int]] = [(value, -1)]
    while pending:
        node, axis = pending.pop()
        if not isinstance(node, fx.Node):
            continue
        axis %= len(shape_of(node))
        if node is product:
            return axis == len(shape_of(node)) - 2
        if is_cheap(node):
            pending.extend((operands(node, axis) or {}).items())
    return False


def _beside_sinks(softmax: fx.Node, weights: fx.Node) -> fx.Node | None:
    """What ``weights`` are the softmax of, if others stand beside it that belong to no key.

    A softmax over both gives weights that do not sum to 1; those of the sinks are thrown away.
    """
    axis = len(shape_of(weights)) - 1
    node, where = weights, Tokens(1, shape_of(weights)[axis], batch_axis=None, axis=axis)
    while node.target is not aten.cat.default:
        moved = tokenwise.segment(node, where)
        if moved is not None:
            node, where = moved
            continue
        carried = {softmax.args[0]: where.axis} if node is softmax else operands(node, where.axis)
        if not carried or len(carried) > 1:
            return None
        ((source, at),) = carried.items()
        if not isinstance(source, fx.Node):
            return None
        node, where = source, replace(where, axis=at)
    part = tokenwise.segment(node, where)
    is_whole = part is not None and shape_of(part[0])[where.axis] == where.count
    return part[0] if part is not None and is_whole else None


def _is_relayout(node: fx.Node) -> bool:
    return node.target in RELAYOUTS


def _upstream(
    value: object, wanted: Container[object], through: Callable[[fx.Node], bool]
) -> Iterator[fx.Node]:
    """The nodes upstream with a ``wanted`` operator, nearest first, ``through`` others only."""
    pending, seen = [value], set()
    while pending:
        node = pending.pop(0)
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target in wanted:
            yield node
        elif through(node):
            pending.extend(node.all_input_nodes)
