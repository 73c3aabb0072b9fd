"""What linear layers and attention look like in a pre-dispatch ATen graph, in all their spellings.

    linear      linear, addmm, mm or matmul with a weight; packed low-bit weights; convolution with
                a kernel of one position
    attention   scaled_dot_product_attention; softmax(scale q k^T + mask) v by matmul, bmm or
                baddbmm (einsum is one of these after tracing); operators that
                ``register_attention`` knows

A node is *constant* (``meta["constant"]``, set by ``capture.aten``) if it depends on the model's
parameters and buffers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from toca_fx.graph.ops import (
    LINEAR_POINTWISE,
    PRODUCTS,
    RELAYOUTS,
    SOFTMAXES,
    argument,
    aten,
    overloads_of,
)

Layout = Literal["bhnd", "bnhd"]

# What may lie between the product of queries and keys and its softmax: scaling and masks.
_SCALED = RELAYOUTS | LINEAR_POINTWISE | {aten.masked_fill.Scalar}


@dataclass(frozen=True)
class Attention:
    """An attention in a graph, and its operands.

    ``output`` is the operator's result. ``query``, ``key`` and ``value`` are what it reads, in
    ``layout`` (heads and samples may be one axis in spelled-out attention, whose key may be
    transposed). ``weights`` is the map, if the graph has it.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    weights: fx.Node | None = None
    layout: Layout = "bhnd"


@dataclass(frozen=True)
class _Registered:
    query: int
    key: int
    value: int
    layout: Layout


_registered: dict[object, _Registered] = {
    aten.scaled_dot_product_attention.default: _Registered(0, 1, 2, "bhnd")
}


def register_attention(
    op: Callable[..., Any], *, query: int = 0, key: int = 1, value: int = 2, layout: Layout = "bhnd"
) -> None:
    """Make a fused attention operator known, such as ``torch.ops.my_lib.attention``.

    ``query``, ``key`` and ``value`` are the positions of these arguments; ``layout`` is the order
    of their axes: "bhnd" [batch, heads, tokens, width] as in PyTorch, or "bnhd" as in
    flash-attention. An argument called ``scale`` or ``softmax_scale`` is honoured, else the scale
    is width ** -0.5. It has to return one tensor in the layout of the query.

    Raises:
        TypeError: ``op`` is no operator of ``torch.ops`` (see ``torch.library.custom_op``).
        ValueError: an unknown layout.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f'layout={layout!r}: expected "bhnd" or "bnhd"')
    overloads = overloads_of(op)
    if not overloads:
        raise TypeError(
            f"register_attention({op!r}): expected an operator such as torch.ops.my_lib.attention"
        )
    for overload in overloads:
        _registered[overload] = _Registered(query, key, value, layout)


def attention_at(node: fx.Node) -> Attention | None:
    """The attention whose result is ``node``, None if it is something else."""
    known = _registered.get(node.target)
    if known is not None:
        query, key, value = (
            node.args[at] if at < len(node.args) else None
            for at in (known.query, known.key, known.value)
        )
        if isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node):
            return Attention(node, query, key, value, layout=known.layout)
        return None
    if node.target not in PRODUCTS or node.target is aten.baddbmm.default:
        return None
    weights, value = node.args[:2]
    softmax = _back(weights, lambda at: at.target in SOFTMAXES, RELAYOUTS)
    if softmax is None or not isinstance(weights, fx.Node) or not isinstance(value, fx.Node):
        return None
    rank = len(softmax.meta["val"].shape)
    if softmax.args[1] not in (-1, rank - 1):
        return None
    product = _back(softmax.args[0], lambda at: at.target in PRODUCTS, _SCALED)
    if product is None:
        return None
    query, key = product.args[-2:]
    if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
        return None
    return Attention(node, query, key, value, weights)


def attention_scale(node: fx.Node) -> Any:
    """The scale argument of an attention operator; None if it has none."""
    return argument(node, "scale", "softmax_scale")


def _back(
    value: object, wanted: Callable[[fx.Node], bool], through: frozenset[Any]
) -> fx.Node | None:
    """The nearest wanted node upstream, through operators of ``through`` only; None if none."""
    pending, seen = [value], set()
    while pending:
        node = pending.pop(0)
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if wanted(node):
            return node
        if node.target in through:
            pending.extend(node.all_input_nodes)
    return None
