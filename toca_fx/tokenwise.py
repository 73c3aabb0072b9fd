"""Which operators act on each token by itself, and along which axis the tokens lie.

``token_operands(node, axis)`` answers one question: if only some positions along ``axis`` of this node's output
are wanted, which operands have to be restricted to the same positions, and along which of their axes? ``None``
means that the operator mixes tokens or has no rule: the restriction has to be applied to its output instead,
which is correct and only slower.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Operands = dict[fx.Node, int]
Rule = Callable[[fx.Node, int], "Operands | None"]


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of a node's output; raises TypeError for a node that returns no single tensor."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TypeError(f"{node} returns {type(value).__name__}, not a tensor")
    return value.shape


def token_operands(node: fx.Node, axis: int) -> Operands | None:
    """Operands of ``node`` that carry the tokens of output axis ``axis``, with the axis in each; None if it mixes tokens."""
    if node.op != "call_function":
        return None
    rule = _RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    return rule(node, axis) if rule is not None else None


def batch_operands(node: fx.Node, axis: int, batch: int) -> Operands | None:
    """Like ``token_operands`` for the batch axis, except that a batch of one counts and that operands may lack it.

    None if the operator mixes samples or has no rule. An operand that broadcasts over the samples is left out.
    """
    if node.op != "call_function":
        return None
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, axis)
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return None
    rank = len(shape_of(node))
    operands = [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), Tensor)]
    aligned = {operand: axis - rank + len(shape_of(operand)) for operand in operands}
    return {operand: at for operand, at in aligned.items() if at >= 0 and shape_of(operand)[at] == batch}


def has_sizes(node: fx.Node) -> bool:
    """Whether the operator spells out its output's sizes, the number of tokens among them."""
    return node.target in (aten.view.default, aten.reshape.default, aten.expand.default)


def resized(node: fx.Node, axis: int, count: fx.Node) -> list[Any]:
    """The sizes of a view, reshape or expand with ``count`` tokens along ``axis``."""
    sizes: Any = node.args[1]
    return [count if at == axis and size != -1 else size for at, size in enumerate(sizes)]


def _pointwise(node: fx.Node, axis: int) -> Operands | None:
    """Broadcasting aligns axes from the right; an operand of size 1 there serves every token as it is."""
    shape = shape_of(node)
    operands: Operands = {}
    for operand in node.all_input_nodes:
        if not isinstance(operand.meta.get("val"), Tensor):
            continue
        size = shape_of(operand)
        aligned = axis - len(shape) + len(size)
        if aligned >= 0 and size[aligned] == shape[axis] != 1:
            operands[operand] = aligned
    return operands or None


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise TypeError(f"{node}: the first argument is {first!r}, not a node")
    return first


def _linear(node: fx.Node, axis: int) -> Operands | None:
    return {_first(node): axis} if axis != len(shape_of(node)) - 1 else None


def _layer_norm(node: fx.Node, axis: int) -> Operands | None:
    normalized: Any = node.args[1]
    return {_first(node): axis} if axis < len(shape_of(node)) - len(normalized) else None


def _same_axis(node: fx.Node, axis: int) -> Operands | None:
    return {_first(node): axis}


def _dim(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    """An axis argument, counted from the front; it is given by position or as ``dim``."""
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    if not isinstance(dim, int):
        raise TypeError(f"{node}: the axis is {dim!r}, not an integer")
    return dim % rank


def _along_dim(position: int, default: int) -> Rule:
    """Operators that act along one axis (softmax, chunk, ...): per token if that axis is not the token axis."""

    def rule(node: fx.Node, axis: int) -> Operands | None:
        dim = _dim(node, position, len(shape_of(_first(node))), default)
        return {_first(node): axis} if dim != axis else None

    return rule


def _unbind(node: fx.Node, axis: int) -> Operands | None:
    removed = _dim(node, 1, len(shape_of(_first(node))))
    return {_first(node): axis + (axis >= removed)}


def _cat(node: fx.Node, axis: int) -> Operands | None:
    return dict.fromkeys(node.all_input_nodes, axis) if _dim(node, 1, len(shape_of(node))) != axis else None


def _transpose(node: fx.Node, axis: int) -> Operands | None:
    rank = len(shape_of(node))
    a, b = _dim(node, 1, rank), _dim(node, 2, rank)
    return {_first(node): {a: b, b: a}.get(axis, axis)}


def _permute(node: fx.Node, axis: int) -> Operands | None:
    order: Any = node.args[1]
    return {_first(node): order[axis] % len(order)}


def _unsqueeze(node: fx.Node, axis: int) -> Operands | None:
    added = _dim(node, 1, len(shape_of(node)))
    return None if axis == added else {_first(node): axis - (axis > added)}


def _select(node: fx.Node, axis: int) -> Operands | None:
    removed = _dim(node, 1, len(shape_of(_first(node))))
    return {_first(node): axis + (axis >= removed)}


def _view(node: fx.Node, axis: int) -> Operands | None:
    """A view keeps the token axis if an input axis has the same size and the same number of elements before it."""
    target, source = shape_of(node), shape_of(_first(node))
    before = _product(target[:axis])
    for candidate in range(len(source)):
        if source[candidate] == target[axis] and _product(source[:candidate]) == before:
            return {_first(node): candidate}
    return None


def _expand(node: fx.Node, axis: int) -> Operands | None:
    source = shape_of(_first(node))
    aligned = axis - len(shape_of(node)) + len(source)
    return {_first(node): aligned} if aligned >= 0 and source[aligned] == shape_of(node)[axis] else None


def _product(sizes: torch.Size) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


_RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.dropout.default: _same_axis,
    aten.to.dtype: _same_axis,
    aten.clone.default: _same_axis,
    aten.contiguous.default: _same_axis,
    aten.softmax.int: _along_dim(1, -1),
    aten.chunk.default: _along_dim(2, 0),
    aten.split.Tensor: _along_dim(2, 0),
    aten.split_with_sizes.default: _along_dim(2, 0),
    aten.unbind.int: _unbind,
    aten.slice.Tensor: _along_dim(1, 0),
    operator.getitem: _same_axis,
    aten.cat.default: _cat,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten.expand.default: _expand,
}
