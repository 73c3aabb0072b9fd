"""Which operators act on each token by itself, and where the tokens of their operands lie.

``operands(node, where)`` answers one question: if only some of the tokens at ``where`` in this node's output are wanted,
which operands have to be restricted to the same tokens, and where do those lie in each of them? ``None`` means that the
operator mixes tokens or has no rule: the restriction has to be applied to its output instead, which is correct and
only slower.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Axes = dict[fx.Node, int]
Rule = Callable[[fx.Node, int], "Axes | None"]


@dataclass(frozen=True)
class Tokens:
    """Where the ``count`` tokens of ``batch`` samples lie in a tensor.

    ``batch_axis`` and ``axis`` are its axes; equal, if samples and tokens are flattened into one; ``batch_axis`` is None
    in a tensor that all samples share. The tokens are the positions from ``offset`` on, if the axis holds more than them.
    """

    batch: int
    count: int
    batch_axis: int | None = 0
    axis: int = 1
    offset: int = 0

    @property
    def flat(self) -> bool:
        """Whether samples and tokens share one axis."""
        return self.batch_axis == self.axis


Operands = dict[fx.Node, Tokens]
Segment = tuple[fx.Node, Tokens]


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of a node's output; raises TypeError for a node that returns no single tensor."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TypeError(f"{node} returns {type(value).__name__}, not a tensor")
    return value.shape


def operands(node: fx.Node, where: Tokens) -> Operands | None:
    """Operands of ``node`` that carry its tokens, and where; None if it mixes tokens or samples, or has no rule."""
    if node.op != "call_function":
        return None
    if node.target in _VIEWS and (where.flat or _is_flat_source(node, where)):
        return _view_samples(node, where) if node.target is not aten.unflatten.int else None
    by_token = axis_operands(node, where.axis)
    if by_token is None or where.batch_axis is None or (node.target is aten.unflatten.int and _splits(node, where.axis)):
        return None
    if where.flat:
        return {operand: replace(where, batch_axis=axis, axis=axis) for operand, axis in by_token.items()}
    by_batch = _batch_operands(node, where.batch_axis, where.batch)
    if by_batch is None:
        return None
    return {operand: replace(where, batch_axis=by_batch.get(operand), axis=axis) for operand, axis in by_token.items()}


def segment(node: fx.Node, where: Tokens) -> Segment | None:
    """For a slice or a concatenation along the token axis: the one operand that the tokens come from, unchanged."""
    rule = _SEGMENTS.get(node.target)
    return rule(node, where) if rule is not None and not where.flat else None


def axis_operands(node: fx.Node, axis: int) -> Axes | None:
    """Operands that carry one axis of the output, with the axis in each; None if positions along it are mixed."""
    rule = _RULES.get(node.target)
    if rule is None and is_pointwise(node):
        rule = _pointwise
    return rule(node, axis) if rule is not None else None


def _batch_operands(node: fx.Node, axis: int, batch: int) -> Axes | None:
    """Like ``axis_operands`` for the batch axis, except that a batch of one counts and that operands may lack it."""
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, axis)
    if not is_pointwise(node):
        return None
    rank = len(shape_of(node))
    aligned = {operand: axis - rank + len(shape_of(operand)) for operand in _tensors(node)}
    return {operand: at for operand, at in aligned.items() if at >= 0 and shape_of(operand)[at] == batch}


def is_pointwise(node: fx.Node) -> bool:
    """Whether every element of the output depends on the broadcast elements at its position only."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _POINTWISE


def has_sizes(node: fx.Node) -> bool:
    """Whether the operator spells out its output's sizes, the number of tokens among them."""
    return node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)


def resized(node: fx.Node, axis: int, count: Any) -> list[Any]:
    """The sizes of a view, reshape or expand with ``count`` positions along ``axis``."""
    sizes: Any = node.args[1]
    return [count if at == axis and size != -1 else size for at, size in enumerate(sizes)]


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), Tensor)]


def _pointwise(node: fx.Node, axis: int) -> Axes | None:
    """Broadcasting aligns axes from the right; an operand of size 1 there serves every token as it is."""
    shape = shape_of(node)
    carried: Axes = {}
    for operand in _tensors(node):
        size = shape_of(operand)
        aligned = axis - len(shape) + len(size)
        if aligned >= 0 and size[aligned] == shape[axis] != 1:
            carried[operand] = aligned
    return carried or None


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise TypeError(f"{node}: the first argument is {first!r}, not a node")
    return first


def _linear(node: fx.Node, axis: int) -> Axes | None:
    return {_first(node): axis} if axis != len(shape_of(node)) - 1 else None


def _mm(node: fx.Node, axis: int) -> Axes | None:
    return {_first(node): axis} if axis == 0 else None


def _addmm(node: fx.Node, axis: int) -> Axes | None:
    bias, rows, _ = node.args
    if axis != 0 or not isinstance(rows, fx.Node) or (isinstance(bias, fx.Node) and len(shape_of(bias)) > 1):
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
        return {left: axis}
    axes = {left: axis}
    aligned = axis - rank + len(shape_of(right))
    if aligned >= 0 and shape_of(right)[aligned] == shape_of(node)[axis]:
        axes[right] = aligned
    return axes


def _attention(node: fx.Node, axis: int) -> Axes | None:
    """Queries are independent of each other; samples and heads are those of all operands."""
    read = [operand for operand in node.args[:3] if isinstance(operand, fx.Node)]
    if len(read) != 3:
        return None
    causal = node.kwargs.get("is_causal") or (len(node.args) > 5 and node.args[5])
    dropout = node.kwargs.get("dropout_p") or (len(node.args) > 4 and node.args[4])
    rank = len(shape_of(node))
    if causal or dropout or axis == rank - 1:
        return None
    mask: Any = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    axes = dict.fromkeys(read[:1] if axis == rank - 2 else read, axis)
    if isinstance(mask, fx.Node):
        aligned = axis - rank + len(shape_of(mask))
        if aligned >= 0 and shape_of(mask)[aligned] == shape_of(node)[axis] != 1:
            axes[mask] = aligned
    return axes


def _convolution(node: fx.Node, axis: int) -> Axes | None:
    """With a kernel of one position a convolution is a linear layer on channels that come second."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or axis == 1 or any(size != 1 for size in shape_of(weight)[2:]):
        return None
    return {_first(node): axis} if shape_of(node) == (*shape_of(node)[:2], *shape_of(_first(node))[2:]) else None


def _layer_norm(node: fx.Node, axis: int) -> Axes | None:
    normalized: Any = node.args[1]
    return {_first(node): axis} if axis < len(shape_of(node)) - len(normalized) else None


def _same_axis(node: fx.Node, axis: int) -> Axes | None:
    return {_first(node): axis}


def _dim(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    """An axis argument, counted from the front; it is given by position or as ``dim``."""
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    if not isinstance(dim, int):
        raise TypeError(f"{node}: the axis is {dim!r}, not an integer")
    return dim % rank


def _along_dim(position: int, default: int) -> Rule:
    """Operators that act along one axis (softmax, chunk, ...): per token if that axis is not the token axis."""

    def rule(node: fx.Node, axis: int) -> Axes | None:
        if len(node.args) > position and node.args[position] is None:
            return None
        dim = _dim(node, position, len(shape_of(_first(node))), default)
        return {_first(node): axis} if dim != axis else None

    return rule


def _reduction(node: fx.Node, axis: int) -> Axes | None:
    """Sums, means and norms over other axes."""
    rank = len(shape_of(_first(node)))
    position = 2 if node.target is aten.linalg_vector_norm.default else 1
    dims: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if dims is None:
        return None
    reduced = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}
    kept = node.args[position + 1] if len(node.args) > position + 1 else node.kwargs.get("keepdim", False)
    left = list(range(rank)) if kept else [at for at in range(rank) if at not in reduced]
    return {_first(node): left[axis]} if left[axis] not in reduced else None


def _unbind(node: fx.Node, axis: int) -> Axes | None:
    removed = _dim(node, 1, len(shape_of(_first(node))))
    return {_first(node): axis + (axis >= removed)}


def _cat(node: fx.Node, axis: int) -> Axes | None:
    return dict.fromkeys(node.all_input_nodes, axis) if _dim(node, 1, len(shape_of(node))) != axis else None


def _stack(node: fx.Node, axis: int) -> Axes | None:
    added = _dim(node, 1, len(shape_of(node)))
    return dict.fromkeys(node.all_input_nodes, axis - (axis > added)) if axis != added else None


def _transpose(node: fx.Node, axis: int) -> Axes | None:
    rank = len(shape_of(node))
    a, b = _dim(node, 1, rank), _dim(node, 2, rank)
    return {_first(node): {a: b, b: a}.get(axis, axis)}


def _matrix_transpose(node: fx.Node, axis: int) -> Axes | None:
    rank = len(shape_of(node))
    return {_first(node): {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis)}


def _permute(node: fx.Node, axis: int) -> Axes | None:
    order: Any = node.args[1]
    return {_first(node): order[axis] % len(order)}


def _unsqueeze(node: fx.Node, axis: int) -> Axes | None:
    added = _dim(node, 1, len(shape_of(node)))
    return None if axis == added else {_first(node): axis - (axis > added)}


def _select(node: fx.Node, axis: int) -> Axes | None:
    removed = _dim(node, 1, len(shape_of(_first(node))))
    return {_first(node): axis + (axis >= removed)}


def _view(node: fx.Node, axis: int) -> Axes | None:
    """A view keeps the token axis if an input axis has the same size and the same number of elements before it."""
    target, source = shape_of(node), shape_of(_first(node))
    before = math.prod(target[:axis])
    for candidate in range(len(source)):
        if source[candidate] == target[axis] and math.prod(source[:candidate]) == before:
            return {_first(node): candidate}
    return None


def _splits(node: fx.Node, axis: int) -> bool:
    """Whether an unflatten spells out the size of ``axis``."""
    dim, sizes = _dim(node, 1, len(shape_of(_first(node)))), node.args[2]
    return isinstance(sizes, (list, tuple)) and dim <= axis < dim + len(sizes)


def _expand(node: fx.Node, axis: int) -> Axes | None:
    source = shape_of(_first(node))
    aligned = axis - len(shape_of(node)) + len(source)
    return {_first(node): aligned} if aligned >= 0 and source[aligned] == shape_of(node)[axis] else None


def _is_flat_source(node: fx.Node, where: Tokens) -> bool:
    """Whether a view splits one axis of its input into samples and tokens."""
    if where.batch_axis is None or where.axis != where.batch_axis + 1 or where.offset:
        return False
    return _view(node, where.batch_axis) is None or _view(node, where.axis) is None


def _view_samples(node: fx.Node, where: Tokens) -> Operands | None:
    """Views between [batch, tokens, ...] and [batch * tokens, ...]."""
    if where.batch_axis is None or where.offset:
        return None
    source, target = shape_of(_first(node)), shape_of(node)
    before, both = math.prod(target[: where.batch_axis]), where.batch * where.count
    for candidate, size in enumerate(source):
        if math.prod(source[:candidate]) != before:
            continue
        if size == both:
            return {_first(node): replace(where, batch_axis=candidate, axis=candidate)}
        if where.flat and source[candidate : candidate + 2] == (where.batch, where.count):
            return {_first(node): replace(where, batch_axis=candidate, axis=candidate + 1)}
    return None


def _slice_segment(node: fx.Node, where: Tokens) -> Segment | None:
    """``x[:, start:]``: the same tokens lie further back in x."""
    start: Any = node.args[2] if len(node.args) > 2 else None
    step = node.args[4] if len(node.args) > 4 else 1
    if _dim(node, 1, len(shape_of(node))) != where.axis or step != 1 or not isinstance(start, (int, type(None))):
        return None
    size = shape_of(_first(node))[where.axis]
    begin = 0 if start is None else min(start, size) if start >= 0 else max(start + size, 0)
    return _first(node), replace(where, offset=where.offset + begin)


def _narrow_segment(node: fx.Node, where: Tokens) -> Segment | None:
    start: Any = node.args[2]
    if _dim(node, 1, len(shape_of(node))) != where.axis:
        return None
    return _first(node), replace(where, offset=where.offset + start % shape_of(_first(node))[where.axis])


def _item_segment(node: fx.Node, where: Tokens) -> Segment | None:
    """One part of a split or chunk."""
    whole, index = _first(node), node.args[1]
    if whole.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default) or not isinstance(index, int):
        return None
    if _dim(whole, 2, len(shape_of(_first(whole)))) != where.axis:
        return None
    parts = whole.meta["val"]
    before = sum(part.shape[where.axis] for part in parts[: index % len(parts)])
    return _first(whole), replace(where, offset=where.offset + before)


def _cat_segment(node: fx.Node, where: Tokens) -> Segment | None:
    """Several streams in one sequence, of which the tokens lie in one."""
    if _dim(node, 1, len(shape_of(node))) != where.axis:
        return None
    begin = 0
    parts: Any = node.args[0]
    for part in parts:
        size = shape_of(part)[where.axis]
        if begin <= where.offset and where.offset + where.count <= begin + size:
            return part, replace(where, offset=where.offset - begin)
        begin += size
    return None


def _scatter_segment(node: fx.Node, where: Tokens) -> Segment | None:
    """``x[:, start:end] = y``: the tokens lie in y, or in the part of x that stays."""
    given: tuple[Any, ...] = tuple(node.args)
    whole, part, dim, start, end, step = given + (0, None, None, 1)[len(given) - 2 :]
    if not isinstance(whole, fx.Node) or not isinstance(part, fx.Node) or not isinstance(dim, int) or step != 1:
        return None
    if dim % len(shape_of(node)) != where.axis:
        return None
    size = shape_of(node)[where.axis]
    if not all(isinstance(bound, (int, type(None))) for bound in (start, end)):
        return None
    begin, stop, _ = slice(start, end).indices(size)
    if begin <= where.offset and where.offset + where.count <= stop:
        return part, replace(where, offset=where.offset - begin)
    return (whole, where) if where.offset >= stop or where.offset + where.count <= begin else None


def _slice_scatter(node: fx.Node, axis: int) -> Axes | None:
    whole, part = node.args[:2]
    dim = node.args[2] if len(node.args) > 2 else 0
    rank = len(shape_of(node))
    if not isinstance(whole, fx.Node) or not isinstance(part, fx.Node) or not isinstance(dim, int) or dim % rank == axis:
        return None
    if node.target is aten.slice_scatter.default:
        return {whole: axis, part: axis}
    return {whole: axis, part: axis - (axis > dim % rank)}


_POINTWISE = frozenset({operator.add, operator.mul, operator.sub, operator.truediv})
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int})

# Operators that take tokens from a longer sequence or put them into one.
_SEGMENTS: dict[Any, Callable[[fx.Node, Tokens], Segment | None]] = {
    aten.slice.Tensor: _slice_segment,
    aten.narrow.default: _narrow_segment,
    operator.getitem: _item_segment,
    aten.cat.default: _cat_segment,
    aten.slice_scatter.default: _scatter_segment,
}

_RULES: dict[Any, Rule] = {
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
    aten.repeat_interleave.self_int: _along_dim(2, 0),
    operator.getitem: _same_axis,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.transpose.int: _transpose,
    aten.mT.default: _matrix_transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _view,
    aten.select.int: _select,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.expand.default: _expand,
}
