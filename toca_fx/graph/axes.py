"""Rules of operators: along which axes an output is made position by position.

A rule takes a node and an axis of its output, and returns the operands that carry the axis with the
axis in each; None if positions along it are mixed. The table in ``graph.ops`` says which operator
has which rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

Axes = dict[fx.Node, int]
Rule = Callable[[fx.Node, int], Axes | None]


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of a node's output.

    Raises:
        TypeError: the node returns no single tensor.
    """
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TypeError(f"{node} returns {type(value).__name__}, not a tensor")
    return value.shape


def resized(node: fx.Node, axis: int, count: Any) -> list[Any]:
    """The sizes of a view, reshape or expand with ``count`` positions along ``axis``."""
    sizes: Any = node.args[1]
    return [count if at == axis else shape_of(node)[at] for at in range(len(sizes))]


def tensors(node: fx.Node) -> list[fx.Node]:
    """The operands that are tensors."""
    return [
        operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), Tensor)
    ]


def first_operand(node: fx.Node) -> fx.Node:
    """The first argument.

    Raises:
        TypeError: it is no node.
    """
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise TypeError(f"{node}: the first argument is {first!r}, not a node")
    return first


def axis_argument(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    """An axis argument, counted from the front; it is given by position or as ``dim``.

    Raises:
        TypeError: it is no integer.
    """
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    if not isinstance(dim, int):
        raise TypeError(f"{node}: the axis is {dim!r}, not an integer")
    return dim % rank


def pointwise(node: fx.Node, axis: int) -> Axes | None:
    """Operands are broadcast: axes are aligned from the right.

    An operand of size 1 along the axis is the same for every token, and does not carry it.
    """
    shape = shape_of(node)
    carried: Axes = {}
    for operand in tensors(node):
        size = shape_of(operand)
        aligned = axis - len(shape) + len(size)
        if aligned >= 0 and size[aligned] == shape[axis] != 1:
            carried[operand] = aligned
    return carried or None


def all_but_last(node: fx.Node, axis: int) -> Axes | None:
    """The last axis is mixed, the others are kept: a linear layer, complex numbers as pairs."""
    return {first_operand(node): axis} if axis != len(shape_of(node)) - 1 else None


def mm(node: fx.Node, axis: int) -> Axes | None:
    """Rows of the left operand, times one matrix."""
    return {first_operand(node): axis} if axis == 0 else None


def addmm(node: fx.Node, axis: int) -> Axes | None:
    """Rows of the left operand, times one matrix, plus one row for all of them."""
    bias, rows, _ = node.args
    many = isinstance(bias, fx.Node) and len(shape_of(bias)) > 1
    return {rows: 0} if axis == 0 and isinstance(rows, fx.Node) and not many else None


def matmul(node: fx.Node, axis: int) -> Axes | None:
    """Rows of the left operand, columns of the right one.

    Axes in front of the matrices are shared by both.
    """
    return _product(node, axis, *node.args[:2])


def baddbmm(node: fx.Node, axis: int) -> Axes | None:
    """A product, and what is added to it."""
    added = node.args[0]
    carried = _product(node, axis, *node.args[1:3])
    if carried is None or not isinstance(added, fx.Node) or added in carried:
        return None
    aligned = axis - len(shape_of(node)) + len(shape_of(added))
    varies = aligned >= 0 and shape_of(added)[aligned] == shape_of(node)[axis] != 1
    return {**carried, added: aligned} if varies else carried


def _product(node: fx.Node, axis: int, left: object, right: object) -> Axes | None:
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    rank, size = len(shape_of(node)), shape_of(node)[axis]
    if min(len(shape_of(left)), len(shape_of(right))) < 2:
        return None  # a vector, of which the output lacks the axis
    carries = {rank - 2: [left], rank - 1: [right]}.get(axis, [left, right])
    aligned = {operand: axis - rank + len(shape_of(operand)) for operand in carries}
    carried = {
        operand: at
        for operand, at in aligned.items()
        if at >= 0 and shape_of(operand)[at] == size and (axis >= rank - 2 or size != 1)
    }
    return carried or None


def attention(node: fx.Node, axis: int) -> Axes | None:
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


def convolution(node: fx.Node, axis: int) -> Axes | None:
    """A kernel of one position makes a linear layer, on channels along the second axis."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or axis == 1:
        return None
    one_position = all(size == 1 for size in shape_of(weight)[2:])
    source = first_operand(node)
    return {source: axis} if one_position and shape_of(node)[2:] == shape_of(source)[2:] else None


def layer_norm(node: fx.Node, axis: int) -> Axes | None:
    """Norms over the last axes, as many as the argument has sizes."""
    normalized: Any = node.args[1]
    return {first_operand(node): axis} if axis < len(shape_of(node)) - len(normalized) else None


def same_axis(node: fx.Node, axis: int) -> Axes | None:
    """Axes stay where they are."""
    return {first_operand(node): axis}


def along_dim(position: int, default: int) -> Rule:
    """The rule of operators that act along one axis (softmax, chunk, ...): the others are kept.

    The axis is the argument at ``position``, or ``default``.
    """

    def rule(node: fx.Node, axis: int) -> Axes | None:
        if len(node.args) > position and node.args[position] is None:
            return None
        dim = axis_argument(node, position, len(shape_of(first_operand(node))), default)
        return {first_operand(node): axis} if dim != axis else None

    return rule


def apart_from(position: int) -> Rule:
    """The rule of operators that move positions along some axes (flip): the others are kept.

    The axes are the argument at ``position``; if it names none, it is all of them.
    """

    def rule(node: fx.Node, axis: int) -> Axes | None:
        dims: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dims")
        moved = [dims] if isinstance(dims, int) else dims or range(len(shape_of(node)))
        kept = axis not in {dim % len(shape_of(node)) for dim in moved}
        return {first_operand(node): axis} if kept else None

    return rule


def pad(node: fx.Node, axis: int) -> Axes | None:
    """Positions before and behind some axes, given from the last axis on: the others are kept."""
    sizes: Any = node.args[1]
    at = 2 * (len(shape_of(node)) - 1 - axis)
    return {first_operand(node): axis} if not any(sizes[at : at + 2]) else None


def samples(node: fx.Node, axis: int) -> Axes | None:
    """Norms over everything but the first axis, group by group of the second."""
    return {first_operand(node): axis} if axis == 0 else None


def batch_norm(node: fx.Node, axis: int) -> Axes | None:
    """A scale and a shift for each channel, the second axis, unless they are being learnt."""
    learns = node.args[5]
    return {first_operand(node): axis} if axis != 1 and learns is False else None


def reduction(position: int) -> Rule:
    """The rule of sums, means and norms over some axes: the others are kept.

    The axes are the argument at ``position``, and ``keepdim`` is the next.
    """

    def rule(node: fx.Node, axis: int) -> Axes | None:
        rank = len(shape_of(first_operand(node)))
        dims: Any
        dims, keepdim = (
            node.args[at] if len(node.args) > at else node.kwargs.get(name)
            for at, name in ((position, "dim"), (position + 1, "keepdim"))
        )
        if dims is None:
            return None
        reduced = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}
        left = [at for at in range(rank) if keepdim or at not in reduced]
        return {first_operand(node): left[axis]} if left[axis] not in reduced else None

    return rule


def index(node: fx.Node, axis: int) -> Axes | None:
    """Positions chosen along some axes: the others are kept.

    The axes of the indices, which are broadcast, stand where the first of these was; in front, if
    other axes lie in between.
    """
    indices: Any = node.args[1]
    at = [dim for dim, chosen in enumerate(indices) if chosen is not None]
    chosen = [indices[dim] for dim in at]
    if not at or any(_is_mask(one) for one in chosen):
        return None
    first = at[0] if at[-1] - at[0] + 1 == len(at) else 0
    added = max(len(shape_of(one)) for one in chosen)
    if first <= axis < first + added:
        return None
    source = first_operand(node)
    kept = [dim for dim in range(len(shape_of(source))) if dim not in at]
    return {source: kept[axis if axis < first else axis - added]}


def _is_mask(index: fx.Node) -> bool:
    """Whether an index says of each position whether it is chosen."""
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def gather(node: fx.Node, axis: int) -> Axes | None:
    """One position chosen along an axis for each position of the others."""
    source, chosen = first_operand(node), node.args[2]
    if not isinstance(chosen, fx.Node) or axis_argument(node, 1, len(shape_of(node))) == axis:
        return None
    # Sources may be longer than what is chosen: then they are cut off.
    same = shape_of(source)[axis] == shape_of(chosen)[axis]
    return {source: axis, chosen: axis} if same else None


def cat(node: fx.Node, axis: int) -> Axes | None:
    """Parts side by side along another axis."""
    joined = axis_argument(node, 1, len(shape_of(node)))
    return dict.fromkeys(node.all_input_nodes, axis) if axis != joined else None


def stack(node: fx.Node, axis: int) -> Axes | None:
    """Parts side by side along an axis of their own."""
    added = axis_argument(node, 1, len(shape_of(node)))
    return dict.fromkeys(node.all_input_nodes, axis - (axis > added)) if axis != added else None


def repeat(node: fx.Node, axis: int) -> Axes | None:
    """Copies side by side along other axes."""
    repeats: Any = node.args[1]
    source = axis - len(repeats) + len(shape_of(first_operand(node)))
    return {first_operand(node): source} if repeats[axis] == 1 and source >= 0 else None


def transpose(node: fx.Node, axis: int) -> Axes | None:
    """Two axes change places."""
    rank = len(shape_of(node))
    a, b = axis_argument(node, 1, rank), axis_argument(node, 2, rank)
    return {first_operand(node): {a: b, b: a}.get(axis, axis)}


def matrix(node: fx.Node, axis: int) -> Axes | None:
    """The two axes of a matrix change places; a vector stays as it is."""
    return {first_operand(node): len(shape_of(node)) - 1 - axis}


def permute(node: fx.Node, axis: int) -> Axes | None:
    """Axes in the order of the argument."""
    order: Any = node.args[1]
    return {first_operand(node): order[axis] % len(order)}


def unsqueeze(node: fx.Node, axis: int) -> Axes | None:
    """A new axis of one position."""
    added = axis_argument(node, 1, len(shape_of(node)))
    return None if axis == added else {first_operand(node): axis - (axis > added)}


def select(node: fx.Node, axis: int) -> Axes | None:
    """One position of an axis, or each by itself: the axis is gone."""
    removed = axis_argument(node, 1, len(shape_of(first_operand(node))))
    return {first_operand(node): axis + (axis >= removed)}


def view(node: fx.Node, axis: int) -> Axes | None:
    """A view keeps an axis if an input axis has its size, and as many elements before it."""
    target, source = shape_of(node), shape_of(first_operand(node))
    before = math.prod(target[:axis])
    for candidate in range(len(source)):
        if source[candidate] == target[axis] and math.prod(source[:candidate]) == before:
            return {first_operand(node): candidate}
    return None


def expand(node: fx.Node, axis: int) -> Axes | None:
    """Axes of one position are broadcast; the others stay as they are."""
    source = shape_of(first_operand(node))
    aligned = axis - len(shape_of(node)) + len(source)
    kept = aligned >= 0 and source[aligned] == shape_of(node)[axis]
    return {first_operand(node): aligned} if kept else None


def slice_scatter(node: fx.Node, axis: int) -> Axes | None:
    """A part written over some positions along another axis."""
    written = _written(node)
    if written is None or written[2] == axis:
        return None
    whole, part, _ = written
    return {whole: axis, part: axis}


def select_scatter(node: fx.Node, axis: int) -> Axes | None:
    """A part without the axis along which it is written over one position."""
    written = _written(node)
    if written is None or written[2] == axis:
        return None
    whole, part, dim = written
    return {whole: axis, part: axis - (axis > dim)}


def _written(node: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """Of a scatter: what is written over, what with, and along which axis."""
    whole, part = node.args[:2]
    dim = node.args[2] if len(node.args) > 2 else 0
    if not isinstance(whole, fx.Node) or not isinstance(part, fx.Node) or not isinstance(dim, int):
        return None
    return whole, part, dim % len(shape_of(node))
