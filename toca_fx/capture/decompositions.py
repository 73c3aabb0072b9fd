"""Operators that torch itself makes of others: they are traced as what they are made of.

They are other spellings, ``movedim`` of ``permute``, ``tensor_split`` of ``slice``, ``einsum`` of
``bmm``: whoever looks at a graph meets the operators of ``graph.ops`` only, and no rule is written
twice. Those that torch makes of others, and for which there is a rule of their own (``linear``,
``chunk``), stay.

Autocast casts the operands of some (``prelu``, ``vecdot``), and not those of what they are made of:
where it is on, these wait until its casts are in the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.capture.inline import codes_of
from toca_fx.graph.autocast import Autocast
from toca_fx.graph.fragments import Fragments
from toca_fx.graph.ops import overloads_of
from toca_fx.torch_private import OpOverload, has_kernel, is_mutable, tree_leaves

aten = torch.ops.aten

_SPELLINGS = (
    # Axes in another order.
    *(aten.movedim, aten.moveaxis, aten.swapaxes, aten.swapdims),
    *(aten.mT, aten.mH, aten.matrix_H, aten.adjoint, aten.numpy_T),
    # Other axes, more positions, another dtype: no value of a second operand is read.
    *(aten.view_as, aten.reshape_as, aten.type_as, aten.ravel),
    *(aten.expand_as, aten.broadcast_to, aten.tile),
    # Parts, and parts side by side.
    *(aten.tensor_split.sections, aten.tensor_split.indices, aten.unsafe_chunk),
    *(aten.hsplit, aten.vsplit, aten.dsplit, aten.take_along_dim),
    *(aten.concat, aten.concatenate, aten.hstack, aten.vstack, aten.dstack),
    *(aten.column_stack, aten.row_stack, aten.atleast_1d, aten.atleast_2d, aten.atleast_3d),
    *(aten.pad, aten.fliplr, aten.flipud, aten.real, aten.imag),
    # Arithmetic.
    *(aten.multiply, aten.subtract, aten.divide, aten.true_divide, aten.negative, aten.absolute),
    *(aten.clip, aten.prelu, aten.special_expit, aten.special_logit, aten.special_softmax),
    *(aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar),
    # Sums.
    *(aten.std.dim, aten.var.dim, aten.std_mean.dim, aten.var_mean.dim),
    *(aten.linalg_norm.default, aten.frobenius_norm.dim),
    # Products.
    *(aten.inner, aten.tensordot, aten.outer, aten.kron),
    *(aten.linalg_matmul, aten.linalg_multi_dot, aten.chain_matmul, aten.linalg_vecdot),
)


def _einsum(equation: str, operands: Sequence[Tensor], **options: Any) -> Any:
    """``einsum``, with the axes that both operands share (samples, heads) apart in the product.

    torch joins them into one axis, in which samples could no longer be told from heads.
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    product = _batched(inputs.split(","), output, [operand.shape for operand in operands])
    if product is None:
        return aten.einsum.default.decompose(equation, operands, **options)
    first, left, right, order = product
    rows, columns = operands[first], operands[1 - first]
    return torch.matmul(rows.permute(left), columns.permute(right)).permute(order)


def _batched(
    inputs: Sequence[str], output: str, shapes: Sequence[Sequence[int]]
) -> tuple[int, list[int], list[int], list[int]] | None:
    """Which of two operands has the rows of the product, and the orders of all axes for it.

    That is, of the axes of the rows, of the columns, and of the product for the output. None unless
    the operands share several axes, and each has one of its own besides the one to be summed over.
    """
    if len(inputs) != 2 or not all(part.isalpha() for part in (*inputs, output)):
        return None
    if any(len(set(part)) != len(part) for part in (*inputs, output)):
        return None
    both = [axis for axis in inputs[0] if axis in inputs[1]]
    shared = [axis for axis in output if axis in both]
    summed = [axis for axis in both if axis not in output]
    own = [[axis for axis in part if axis not in both] for part in inputs]
    sizes = [
        dict(zip(part, shape, strict=True)) for part, shape in zip(inputs, shapes, strict=True)
    ]
    if (
        len(shared) < 2
        or [len(summed), len(own[0]), len(own[1])] != [1, 1, 1]
        or sorted(output) != sorted([*shared, *own[0], *own[1]])
        or any(sizes[0][axis] != sizes[1][axis] for axis in both)
    ):
        return None
    first = int(output.index(own[0][0]) > output.index(own[1][0]))
    rows, columns = own[first], own[1 - first]
    return (
        first,
        [inputs[first].index(axis) for axis in [*shared, *rows, *summed]],
        [inputs[1 - first].index(axis) for axis in [*shared, *summed, *columns]],
        [[*shared, *rows, *columns].index(axis) for axis in output],
    )


def take_apart(graph: fx.Graph) -> None:
    """Take apart what was left because autocast was on; the casts are in ``graph`` by now."""
    fragments = Fragments(graph, DECOMPOSITIONS)
    for node in list(graph.nodes):
        if node.target in DECOMPOSITIONS:
            fragments.replace(node, functools.partial(_call, node.target))
        for code in codes_of(node):
            take_apart(code.graph)
            code.recompile()


def _call(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


def _unless_cast(op: OpOverload, parts: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``op`` is made of; NotImplemented, which leaves it, if autocast has a kernel for it."""
    on = {device for device, _ in Autocast.now().dtypes}
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    for device in on & {tensor.device.type for tensor in tensors}:
        if has_kernel(op, f"Autocast{device.upper()}"):
            return NotImplemented
    return parts(*args, **kwargs)


_PARTS: Mapping[OpOverload, Callable[..., Any]] = {
    overload: overload.decompose
    for spelling in _SPELLINGS
    for overload in overloads_of(spelling)
    if not is_mutable(overload)
} | {aten.einsum.default: _einsum}

DECOMPOSITIONS: Mapping[OpOverload, Callable[..., Any]] = {
    overload: functools.partial(_unless_cast, overload, parts) for overload, parts in _PARTS.items()
}
