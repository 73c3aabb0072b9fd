"""Operator by operator: along which axes an output is made position by position, and where those
lie in the operands.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Axes = dict[fx.Node, int]
Rule = Callable[[fx.Node, int], "Axes | None"]


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of a node's output; raises TypeError for a node that returns no single tensor."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TypeError(f"{node} returns {type(value).__name__}, not a tensor")
    return value.shape


def operands(node: fx.Node, axis: int) -> Axes | None:
    """Operands that carry one axis of the output, with the axis in each; None if positions along it
    are mixed.
    """
    rule = RULES.get(node.target)
    if rule is None and is_pointwise(node):
        rule = _pointwise
    return rule(node, axis) if rule is not None else None


def is_pointwise(node: fx.Node) -> bool:
    """Whether every element of the output depends on the broadcast elements at its position
    only.
    """
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _POINTWISE


def has_sizes(node: fx.Node) -> bool:
    """Whether the operator spells out its output's sizes, the number of tokens among them."""
    return node.target in (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.expand.default,
    )


def resized(node: fx.Node, axis: int, count: Any) -> list[Any]:
    """The sizes of a view, reshape or expand with ``count`` positions along ``axis``."""
    sizes: Any = node.args[1]
    return [count if at == axis else shape_of(node)[at] for at in range(len(sizes))]


def tensors(node: fx.Node) -> list[fx.Node]:
    """The operands that are tensors."""
    return [
        operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), Tensor)
    ]


def _pointwise(node: fx.Node, axis: int) -> Axes | None:
    """Broadcasting aligns axes from the right; an operand of size 1 there serves every token as it
    is.
    """
    shape = shape_of(node)
    carried: Axes = {}
    for operand in tensors(node):
        size = shape_of(operand)
        aligned = axis - len(shape) + len(size)
        if aligned >= 0 and size[aligned] == shape[axis] != 1:
            carried[operand] = aligned
    return carried or None


def first_operand(node: fx.Node) -> fx.Node:
    """The first argument, which has to be a node."""
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise TypeError(f"{node}: the first argument is {first!r}, not a node")
    return first


def _linear(node: fx.Node, axis: int) -> Axes | None:
    return {first_operand(node): axis} if axis != len(shape_of(node)) - 1 else None


def _mm(node: fx.Node, axis: int) -> Axes | None:
    return {first_operand(node): axis} if axis == 0 else None


def _addmm(node: fx.Node, axis: int) -> Axes | None:
    bias, rows, _ = node.args
    if (
        axis != 0
        or not isinstance(rows, fx.Node)
        or (isinstance(bias, fx.Node) and len(shape_of(bias)) > 1)
    ):
        return None
    return {rows: 0}


def _matmul(node: fx.Node, axis: int) -> Axes | None:
    """Rows of the left operand; axes in front of the matrices are shared by both."""
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    rank = len(shape_of(node))
    if axis == rank - 1 or len(shape_of(left)) != rank:
        return None
    if axis == rank - 2:
        return {left: axis} if left is not right else None
    aligned = {left: axis, right: axis - rank + len(shape_of(right))}
    return {
        operand: at
        for operand, at in aligned.items()
        if at >= 0 and shape_of(operand)[at] == shape_of(node)[axis] != 1
    } or None


def _attention(node: fx.Node, axis: int) -> Axes | None:
    """Queries are independent of each other; samples and heads are those of all operands."""
    read = [operand for operand in node.args[:3] if isinstance(operand, fx.Node)]
    if len(read) != 3:
        return None
    causal = node.kwargs.get("is_causal") or (len(node.args) > 5 and node.args[5])
    dropout = node.kwargs.get("dropout_p") or (len(node.args) > 4 and node.args[4])
    rank = len(shape_of(node))
    if causal or dropout or axis == rank - 1 or (axis == rank - 2 and read[0] in read[1:]):
        return None
    mask: Any = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    axes = dict.fromkeys(read[:1] if axis == rank - 2 else read, axis)
    if isinstance(mask, fx.Node):
        aligned = axis - rank + len(shape_of(mask))
        if aligned >= 0 and shape_of(mask)[aligned] == shape_of(node)[axis] != 1:
            axes[mask] = aligned
    return axes


def _convolution(node: fx.Node, axis: int) -> Axes | None:
    """With a kernel of one position a convolution is a linear layer on channels that come
    second.
    """
    weight = node.args[1]
    if (
        not isinstance(weight, fx.Node)
        or axis == 1
        or any(size != 1 for size in shape_of(weight)[2:])
    ):
        return None
    return (
        {first_operand(node): axis}
        if shape_of(node) == (*shape_of(node)[:2], *shape_of(first_operand(node))[2:])
        else None
    )


def _layer_norm(node: fx.Node, axis: int) -> Axes | None:
    normalized: Any = node.args[1]
    return {first_operand(node): axis} if axis < len(shape_of(node)) - len(normalized) else None


def _same_axis(node: fx.Node, axis: int) -> Axes | None:
    return {first_operand(node): axis}


def _pairs(node: fx.Node, axis: int) -> Axes | None:
    """Complex numbers as pairs along a new last axis."""
    return {first_operand(node): axis} if axis != len(shape_of(node)) - 1 else None


def axis_argument(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    """An axis argument, counted from the front; it is given by position or as ``dim``."""
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    if not isinstance(dim, int):
        raise TypeError(f"{node}: the axis is {dim!r}, not an integer")
    return dim % rank


def _along_dim(position: int, default: int) -> Rule:
    """Operators that act along one axis (softmax, chunk, ...): per token if that axis is not the
    token axis.
    """

    def rule(node: fx.Node, axis: int) -> Axes | None:
        if len(node.args) > position and node.args[position] is None:
            return None
        dim = axis_argument(node, position, len(shape_of(first_operand(node))), default)
        return {first_operand(node): axis} if dim != axis else None

    return rule


def _reduction(node: fx.Node, axis: int) -> Axes | None:
    """Sums, means and norms over other axes."""
    rank = len(shape_of(first_operand(node)))
    position = 2 if node.target is aten.linalg_vector_norm.default else 1
    dims: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if dims is None:
        return None
    reduced = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}
    kept = (
        node.args[position + 1]
        if len(node.args) > position + 1
        else node.kwargs.get("keepdim", False)
    )
    left = list(range(rank)) if kept else [at for at in range(rank) if at not in reduced]
    return {first_operand(node): left[axis]} if left[axis] not in reduced else None


def _unbind(node: fx.Node, axis: int) -> Axes | None:
    removed = axis_argument(node, 1, len(shape_of(first_operand(node))))
    return {first_operand(node): axis + (axis >= removed)}


def _cat(node: fx.Node, axis: int) -> Axes | None:
    return (
        dict.fromkeys(node.all_input_nodes, axis)
        if axis_argument(node, 1, len(shape_of(node))) != axis
        else None
    )


def _stack(node: fx.Node, axis: int) -> Axes | None:
    added = axis_argument(node, 1, len(shape_of(node)))
    return dict.fromkeys(node.all_input_nodes, axis - (axis > added)) if axis != added else None


def _repeat(node: fx.Node, axis: int) -> Axes | None:
    """Copies side by side along other axes."""
    repeats: Any = node.args[1]
    source = axis - len(repeats) + len(shape_of(first_operand(node)))
    return {first_operand(node): source} if repeats[axis] == 1 and source >= 0 else None


def _transpose(node: fx.Node, axis: int) -> Axes | None:
    rank = len(shape_of(node))
    a, b = axis_argument(node, 1, rank), axis_argument(node, 2, rank)
    return {first_operand(node): {a: b, b: a}.get(axis, axis)}


def _matrix_transpose(node: fx.Node, axis: int) -> Axes | None:
    rank = len(shape_of(node))
    return {first_operand(node): {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis)}


def _permute(node: fx.Node, axis: int) -> Axes | None:
    order: Any = node.args[1]
    return {first_operand(node): order[axis] % len(order)}


def _unsqueeze(node: fx.Node, axis: int) -> Axes | None:
    added = axis_argument(node, 1, len(shape_of(node)))
    return None if axis == added else {first_operand(node): axis - (axis > added)}


def _select(node: fx.Node, axis: int) -> Axes | None:
    removed = axis_argument(node, 1, len(shape_of(first_operand(node))))
    return {first_operand(node): axis + (axis >= removed)}


def view_axis(node: fx.Node, axis: int) -> Axes | None:
    """A view keeps the token axis if an input axis has the same size and the same number of
    elements before it.
    """
    target, source = shape_of(node), shape_of(first_operand(node))
    before = math.prod(target[:axis])
    for candidate in range(len(source)):
        if source[candidate] == target[axis] and math.prod(source[:candidate]) == before:
            return {first_operand(node): candidate}
    return None


def _expand(node: fx.Node, axis: int) -> Axes | None:
    source = shape_of(first_operand(node))
    aligned = axis - len(shape_of(node)) + len(source)
    return (
        {first_operand(node): aligned}
        if aligned >= 0 and source[aligned] == shape_of(node)[axis]
        else None
    )


def _slice_scatter(node: fx.Node, axis: int) -> Axes | None:
    whole, part = node.args[:2]
    dim = node.args[2] if len(node.args) > 2 else 0
    rank = len(shape_of(node))
    if (
        not isinstance(whole, fx.Node)
        or not isinstance(part, fx.Node)
        or not isinstance(dim, int)
        or dim % rank == axis
    ):
        return None
    if node.target is aten.slice_scatter.default:
        return {whole: axis, part: axis}
    return {whole: axis, part: axis - (axis > dim % rank)}


_POINTWISE = frozenset({operator.add, operator.mul, operator.sub, operator.truediv})
RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten._weight_int8pack_mm.default: _mm,
    aten._weight_int4pack_mm.default: _mm,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.scaled_dot_product_attention.default: _attention,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.dropout.default: _same_axis,
    aten.to.dtype: _same_axis,
    aten.to.dtype_layout: _same_axis,
    aten.to.device: _same_axis,
    aten._to_copy.default: _same_axis,
    aten.type_as.default: _same_axis,
    aten.clone.default: _same_axis,
    aten.contiguous.default: _same_axis,
    aten.alias.default: _same_axis,
    aten.detach.default: _same_axis,
    aten.view_as_complex.default: _same_axis,
    aten.view_as_real.default: _pairs,
    aten.softmax.int: _along_dim(1, -1),
    aten._softmax.default: _along_dim(1, -1),
    aten.glu.default: _along_dim(1, -1),
    aten.mean.dim: _reduction,
    aten.sum.dim_IntList: _reduction,
    aten.amax.default: _reduction,
    aten.linalg_vector_norm.default: _reduction,
    aten.chunk.default: _along_dim(2, 0),
    aten.split.Tensor: _along_dim(2, 0),
    aten.split_with_sizes.default: _along_dim(2, 0),
    aten.unbind.int: _unbind,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _slice_scatter,
    aten.slice.Tensor: _along_dim(1, 0),
    aten.narrow.default: _along_dim(1, 0),
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _along_dim(2, 0),
    operator.getitem: _same_axis,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.transpose.int: _transpose,
    aten.mT.default: _matrix_transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: view_axis,
    aten.select.int: _select,
    aten.view.default: view_axis,
    aten.reshape.default: view_axis,
    aten._unsafe_view.default: view_axis,
    aten.flatten.using_ints: view_axis,
    aten.unflatten.int: view_axis,
    aten.expand.default: _expand,
}
