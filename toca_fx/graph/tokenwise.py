"""Which operators act on each token by itself, and where the tokens of their operands lie.

``operands(node, where)`` answers one question: if only some of the tokens at ``where`` in this
node's output are wanted, which operands have to be restricted to the same tokens, and where do
those lie in each of them? ``None`` means that the operator mixes tokens or has no rule: the
restriction has to be applied to its output instead, which is correct and only slower.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from toca_fx.graph import axes, ops
from toca_fx.graph.ops import REGROUPS, SPLITS, aten


@dataclass(frozen=True)
class Tokens:
    """Where the ``count`` tokens of ``batch`` samples lie in a tensor.

    ``batch_axis`` and ``axis`` are its axes; equal, if samples and tokens are flattened into one:
    sample by sample, or ``tokens_first``, token by token. ``batch_axis`` is None in a tensor that
    all samples share. Along a batch axis of its own a sample has ``groups`` positions side by side:
    its heads. The tokens are the positions from ``offset`` on, if the axis holds more than them.
    """

    batch: int
    count: int
    batch_axis: int | None = 0
    axis: int = 1
    offset: int = 0
    groups: int = 1
    tokens_first: bool = False

    @property
    def flat(self) -> bool:
        """Whether samples and tokens share one axis."""
        return self.batch_axis == self.axis

    @property
    def samples(self) -> int:
        """The size of a batch axis of its own."""
        return self.batch * self.groups


Operands = dict[fx.Node, Tokens]
Segment = tuple[fx.Node, Tokens]


def operands(node: fx.Node, where: Tokens) -> Operands | None:
    """The operands that carry the tokens of ``node``, and where.

    None if the operator mixes tokens or samples, or has no rule.
    """
    if node.op != "call_function":
        return None
    if where.batch_axis is None or (
        node.target is aten.unflatten.int and _splits(node, where.axis)
    ):
        return None
    if node.target in REGROUPS and (viewed := _regrouped(node, where)) is not None:
        return {axes.first_operand(node): viewed}
    by_token = ops.operands(node, where.axis)
    if by_token is None or (node.target in REGROUPS and (where.flat or where.groups > 1)):
        return None
    if where.flat:
        return {
            operand: replace(where, batch_axis=axis, axis=axis)
            for operand, axis in by_token.items()
        }
    by_batch = _batch_operands(node, where.batch_axis, where.samples)
    if by_batch is None or not all(
        operand in by_batch or _is_shared(node, operand, where.batch_axis) for operand in by_token
    ):
        return None
    return {
        operand: replace(
            where,
            batch_axis=by_batch.get(operand),
            axis=axis,
            groups=where.groups if operand in by_batch else 1,
        )
        for operand, axis in by_token.items()
    }


def followed(node: fx.Node, where: Tokens) -> Operands | None:
    """The same; tokens are followed where samples cannot be: their ``batch_axis`` is None then."""
    found = operands(node, where)
    if found is not None or where.flat or node.op != "call_function":
        return found
    carried = ops.operands(node, where.axis)
    if carried is None:
        return None
    lost = replace(where, batch_axis=None, groups=1)
    return {operand: replace(lost, axis=axis) for operand, axis in carried.items()}


def segment(node: fx.Node, where: Tokens) -> Segment | None:
    """The one operand that the tokens come from, unchanged, and where they lie in it.

    That is so for slices, concatenations and the like along the token axis; None for others.
    """
    rule = _SEGMENTS.get(node.target)
    return rule(node, where) if rule is not None and not where.flat else None


def _batch_operands(node: fx.Node, axis: int, batch: int) -> axes.Axes | None:
    """``ops.operands`` for the batch axis, which may be of size 1, and missing in operands."""
    rule = ops.axis_rule(node)
    if rule is not axes.pointwise:
        return rule(node, axis) if rule is not None else None
    rank = len(axes.shape_of(node))
    aligned = {operand: axis - rank + len(axes.shape_of(operand)) for operand in axes.tensors(node)}
    return {
        operand: at
        for operand, at in aligned.items()
        if at >= 0 and axes.shape_of(operand)[at] == batch
    }


def _is_shared(node: fx.Node, operand: fx.Node, batch_axis: int) -> bool:
    """Whether an operand is broadcast over the samples of the output.

    An operand that is not may have the samples along another axis and mix them, as keys can.
    """
    shape = axes.shape_of(operand)
    aligned = batch_axis - len(axes.shape_of(node)) + len(shape)
    return aligned < 0 or shape[aligned] == 1


def _regrouped(node: fx.Node, where: Tokens) -> Tokens | None:
    """Where the tokens lie in what a view regroups; None if they share an axis with others.

    A view keeps the order of the elements. So tokens and samples are told by how many elements lie
    between one and the next, whatever the axes are.
    """
    target, source = axes.shape_of(node), axes.shape_of(axes.first_operand(node))
    if where.offset or where.batch_axis is None:
        return None
    if target[where.axis] != (where.batch * where.count if where.flat else where.count):
        return None
    if not where.flat and target[where.batch_axis] != where.samples:
        return None
    inside = (where.batch, 1) if where.tokens_first else (1, where.count)  # of tokens, of samples
    if not where.flat:
        inside = (1, where.groups)
    tokens = _axis_with(source, where.count, inside[0] * math.prod(target[where.axis + 1 :]))
    samples = _axis_with(source, where.batch, inside[1] * math.prod(target[where.batch_axis + 1 :]))
    if tokens is None or samples is None:
        return None
    (axis, next_token), (batch_axis, next_sample) = tokens, samples
    there = Tokens(where.batch, where.count, batch_axis=batch_axis, axis=axis)
    if there.flat:
        there = replace(there, tokens_first=next_token > 1)
        is_next = (
            next_token == where.batch and next_sample == 1
            if there.tokens_first
            else (where.batch == 1 or next_sample == where.count)
        )
        is_all = source[axis] == where.batch * where.count
        return there if is_all and is_next else None
    there = replace(there, groups=next_sample)
    is_all = source[axis] == where.count and source[batch_axis] == there.samples
    return there if is_all and next_token == 1 else None


def _axis_with(shape: Sequence[int], count: int, step: int) -> tuple[int, int] | None:
    """The axis along which ``count`` positions, ``step`` elements apart, lie one after the other.

    And how many positions of the axis there are from one to the next; None if there is no such
    axis.
    """
    for axis in range(len(shape)):
        inside = math.prod(shape[axis + 1 :])
        if inside and step % inside == 0 and shape[axis] * inside % (step * count) == 0:
            return axis, step // inside
    return None


def _splits(node: fx.Node, axis: int) -> bool:
    """Whether an unflatten spells out the size of ``axis``."""
    rank, sizes = len(axes.shape_of(axes.first_operand(node))), node.args[2]
    dim = axes.axis_argument(node, 1, rank)
    return isinstance(sizes, (list, tuple)) and dim <= axis < dim + len(sizes)


def _slice_segment(node: fx.Node, where: Tokens) -> Segment | None:
    """``x[:, start:]``: the same tokens lie further back in x."""
    start: Any = node.args[2] if len(node.args) > 2 else None
    step = node.args[4] if len(node.args) > 4 else 1
    if (
        axes.axis_argument(node, 1, len(axes.shape_of(node))) != where.axis
        or step != 1
        or not isinstance(start, (int, type(None)))
    ):
        return None
    size = axes.shape_of(axes.first_operand(node))[where.axis]
    begin = 0 if start is None else min(start, size) if start >= 0 else max(start + size, 0)
    return axes.first_operand(node), replace(where, offset=where.offset + begin)


def _narrow_segment(node: fx.Node, where: Tokens) -> Segment | None:
    start: Any = node.args[2]
    if axes.axis_argument(node, 1, len(axes.shape_of(node))) != where.axis:
        return None
    source = axes.first_operand(node)
    begin = start % axes.shape_of(source)[where.axis]
    return source, replace(where, offset=where.offset + begin)


def _item_segment(node: fx.Node, where: Tokens) -> Segment | None:
    """One part of a split or chunk."""
    whole, index = axes.first_operand(node), node.args[1]
    if whole.target not in SPLITS or not isinstance(index, int):
        return None
    if axes.axis_argument(whole, 2, len(axes.shape_of(axes.first_operand(whole)))) != where.axis:
        return None
    parts = whole.meta["val"]
    before = sum(part.shape[where.axis] for part in parts[: index % len(parts)])
    return axes.first_operand(whole), replace(where, offset=where.offset + before)


def _cat_segment(node: fx.Node, where: Tokens) -> Segment | None:
    """Several streams in one sequence, of which the tokens lie in one."""
    if axes.axis_argument(node, 1, len(axes.shape_of(node))) != where.axis:
        return None
    begin = 0
    parts: Any = node.args[0]
    for part in parts:
        size = axes.shape_of(part)[where.axis]
        if begin <= where.offset and where.offset + where.count <= begin + size:
            return part, replace(where, offset=where.offset - begin)
        begin += size
    return None


def _scatter_segment(node: fx.Node, where: Tokens) -> Segment | None:
    """``x[:, start:end] = y``: the tokens lie in y, or in the part of x that stays."""
    given: tuple[Any, ...] = tuple(node.args)
    whole, part, dim, start, end, step = given + (0, None, None, 1)[len(given) - 2 :]
    if not isinstance(whole, fx.Node) or not isinstance(part, fx.Node):
        return None
    if not isinstance(dim, int) or step != 1:
        return None
    if dim % len(axes.shape_of(node)) != where.axis:
        return None
    size = axes.shape_of(node)[where.axis]
    if not all(isinstance(bound, (int, type(None))) for bound in (start, end)):
        return None
    begin, stop, _ = slice(start, end).indices(size)
    if begin <= where.offset and where.offset + where.count <= stop:
        return part, replace(where, offset=where.offset - begin)
    return (whole, where) if where.offset >= stop or where.offset + where.count <= begin else None


# Operators that take tokens from a longer sequence or put them into one. Not in the table of
# ``ops``, which knows of axes only: these rules are about tokens.
_SEGMENTS: dict[Any, Callable[[fx.Node, Tokens], Segment | None]] = {
    aten.slice.Tensor: _slice_segment,
    aten.narrow.default: _narrow_segment,
    operator.getitem: _item_segment,
    aten.cat.default: _cat_segment,
    aten.slice_scatter.default: _scatter_segment,
}
