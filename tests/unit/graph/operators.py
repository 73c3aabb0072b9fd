"""Operators, and the axes of their outputs that have rules."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """``build(graph's call, *inputs)`` returns the node; ``per_token`` lists the output axes for
    which there is a rule.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    build: Callable[..., fx.Node]
    per_token: tuple[int, ...]


def op(target: Any, *rest: Any, **keywords: Any) -> Callable[..., fx.Node]:
    """A node of one operator over all inputs, then ``rest``."""
    return lambda call, *inputs: call(target, *inputs, *rest, **keywords)


def item(target: Any, index: int, *rest: Any, **keywords: Any) -> Callable[..., fx.Node]:
    """Item ``index`` of an operator that returns several tensors."""
    return lambda call, *inputs: call(
        operator.getitem, call(target, *inputs, *rest, **keywords), index
    )


def joined(target: Any, *rest: Any, **keywords: Any) -> Callable[..., fx.Node]:
    """A node of an operator that takes a list of all inputs."""
    return lambda call, *inputs: call(target, list(inputs), *rest, **keywords)


def real_of_complex(call: Callable[..., fx.Node], x: fx.Node) -> fx.Node:
    return call(aten.view_as_real.default, call(aten.view_as_complex.default, x))


def packed(call: Callable[..., fx.Node], x: fx.Node, scales: fx.Node) -> fx.Node:
    """A linear layer over 8-bit weights, in single precision."""
    x, scales = (call(aten.to.dtype, operand, torch.float32) for operand in (x, scales))
    weight = call(torch.full, (5, 4), 3, dtype=torch.int8)
    return call(aten._weight_int8pack_mm.default, x, weight, scales)


def integers(call: Callable[..., fx.Node], x: fx.Node) -> fx.Node:
    weight = call(torch.full, (4, 5), 3, dtype=torch.int8)
    return call(aten._int_mm.default, call(aten.to.dtype, x, torch.int8), weight)


def scaled(call: Callable[..., fx.Node], x: fx.Node, scales: fx.Node) -> fx.Node:
    """A linear layer in 8-bit floating point, with a scale for each row."""
    few = torch.float8_e4m3fn
    weight = call(aten.t.default, call(aten.to.dtype, call(torch.ones, 16, 16), few))
    scales = call(aten.to.dtype, scales, torch.float32)
    columns = call(torch.ones, 1, 16)
    x = call(aten.to.dtype, x, few)
    return call(aten._scaled_mm.default, x, weight, scales, columns, None, None, torch.float32)


def constant(call: Callable[..., fx.Node], values: list[Any]) -> fx.Node:
    return call(torch.tensor, values)


def indexed(*indices: list[Any] | None) -> Callable[..., fx.Node]:
    """``x[indices]``; None for all positions of an axis."""
    return lambda call, x: call(
        aten.index.Tensor, x, [index and constant(call, index) for index in indices]
    )


def selected(index: list[int]) -> Callable[..., fx.Node]:
    """Positions of the last axis."""
    return lambda call, x: call(aten.index_select.default, x, -1, constant(call, index))


def gathered(call: Callable[..., fx.Node], x: fx.Node, where: fx.Node) -> fx.Node:
    """Positions of the last axis, others for each position of the first two."""
    numbers = call(aten.to.dtype, call(aten.mul.Tensor, where, 9), torch.long)
    return call(aten.gather.default, x, -1, call(aten.remainder.Scalar, numbers, 4))


def batch_norm(learning: bool) -> Callable[..., fx.Node]:
    return lambda call, x, mean, weight: call(
        aten.batch_norm.default,
        *(x, weight, None, mean, call(aten.exp.default, mean), learning, 0.1, 1e-5, False),
    )


X = ((2, 6, 4),)
CASES = [
    Case("linear", ((2, 6, 4), (5, 4), (5,)), op(aten.linear.default), (0, 1)),
    Case("linear without bias, two axes", ((6, 4), (5, 4)), op(aten.linear.default), (0,)),
    Case("layer_norm", X, op(aten.layer_norm.default, [4]), (0, 1)),
    Case("layer_norm over two axes", X, op(aten.layer_norm.default, [6, 4]), (0,)),
    Case(
        "layer_norm, affine",
        ((2, 6, 4), (4,), (4,)),
        lambda call, x, w, b: call(aten.layer_norm.default, x, [4], w, b),
        (0, 1),
    ),
    Case(
        "rms_norm",
        ((2, 6, 4), (4,)),
        lambda call, x, w: call(aten.rms_norm.default, x, [4], w),
        (0, 1),
    ),
    Case("dropout", X, op(aten.dropout.default, 0.5, False), (0, 1, 2)),
    Case("to", X, op(aten.to.dtype, torch.float32), (0, 1, 2)),
    Case("clone", X, op(aten.clone.default), (0, 1, 2)),
    Case("hardswish", X, op(aten.hardswish.default), (0, 1, 2)),
    Case("log_sigmoid", X, op(aten.log_sigmoid.default), (0, 1, 2)),
    Case("contiguous", X, op(aten.contiguous.default), (0, 1, 2)),
    Case("pairs as complex numbers", ((2, 6, 3, 2),), op(aten.view_as_complex.default), (0, 1, 2)),
    Case("complex numbers as pairs", ((2, 6, 3, 2),), real_of_complex, (0, 1, 2)),
    Case("repeat", ((2, 6, 4),), op(aten.repeat.default, [3, 1, 1, 2]), (1, 2)),
    Case("softmax, last", X, op(aten.softmax.int, -1), (0, 1)),
    Case("softmax, middle", X, op(aten.softmax.int, 1), (0, 2)),
    Case("chunk, last", X, item(aten.chunk.default, 1, 2, -1), (0, 1)),
    Case("chunk, first", ((4, 6, 4),), item(aten.chunk.default, 1, 2), (1, 2)),
    Case("chunk, uneven", ((2, 6, 5),), item(aten.chunk.default, 1, 2, 2), (0, 1)),
    Case("split", X, item(aten.split.Tensor, 1, 3, 1), (0, 2)),
    Case("split by keyword", X, item(aten.split.Tensor, 0, 3, dim=1), (0, 2)),
    Case("split_with_sizes", X, item(aten.split_with_sizes.default, 1, [1, 3], 2), (0, 1)),
    Case("unbind, first", ((3, 2, 6, 4),), item(aten.unbind.int, 2), (0, 1, 2)),
    Case("unbind, middle", ((2, 3, 6, 4),), item(aten.unbind.int, 1, 1), (0, 1, 2)),
    Case("unbind, last", ((2, 6, 4, 3),), item(aten.unbind.int, 0, -1), (0, 1, 2)),
    Case("slice", X, op(aten.slice.Tensor, 2, 1, 3), (0, 1)),
    Case("slice, first", X, op(aten.slice.Tensor, 0, 1, 2), (1, 2)),
    Case("cat, last", ((2, 6, 4), (2, 6, 2)), joined(aten.cat.default, -1), (0, 1)),
    Case("cat, default", ((2, 6, 4), (1, 6, 4)), joined(aten.cat.default), (1, 2)),
    Case("transpose", X, op(aten.transpose.int, 1, 2), (0, 1, 2)),
    Case("transpose, negative", ((2, 6, 4, 3),), op(aten.transpose.int, -3, -1), (0, 1, 2, 3)),
    Case("permute", ((2, 6, 3, 5, 4),), op(aten.permute.default, [2, 0, 3, 1, 4]), (0, 1, 2, 3, 4)),
    Case("permute, negative", X, op(aten.permute.default, [-1, 0, -2]), (0, 1, 2)),
    Case("unsqueeze, first", X, op(aten.unsqueeze.default, 0), (1, 2, 3)),
    Case("unsqueeze, middle", X, op(aten.unsqueeze.default, 2), (0, 1, 3)),
    Case("unsqueeze, last", X, op(aten.unsqueeze.default, -1), (0, 1, 2)),
    Case("select, first", ((3, 6, 4),), op(aten.select.int, 0, 2), (0, 1)),
    Case("select, last", X, op(aten.select.int, -1, 2), (0, 1)),
    Case("view, splitting heads", X, op(aten.view.default, [2, 6, 2, 2]), (0, 1)),
    Case("view, merging heads", ((2, 6, 2, 2),), op(aten.view.default, [2, 6, 4]), (0, 1)),
    Case("view, fused qkv", ((2, 6, 12),), op(aten.reshape.default, [2, 6, 3, 2, 2]), (0, 1)),
    Case("view with -1 for channels", X, op(aten.view.default, [2, 6, -1, 2]), (0, 1)),
    Case("view with -1 for tokens", X, op(aten.view.default, [2, -1, 2, 2]), (0, 1)),
    Case("view, merging batch and tokens", X, op(aten.view.default, [12, 4]), (1,)),
    Case("view, moving an axis of 1", ((2, 1, 6),), op(aten.view.default, [2, 6, 1]), (0, 1)),
    Case(
        "reshape after transpose",
        X,
        lambda call, x: call(aten.reshape.default, call(aten.transpose.int, x, 1, 2), [2, 2, 2, 6]),
        (0, 3),
    ),
    Case("expand", ((1, 6, 4),), op(aten.expand.default, [2, 6, 4]), (1, 2)),
    Case("expand, new axis and -1", ((6, 1),), op(aten.expand.default, [2, -1, 4]), (1,)),
    Case("gelu", X, op(aten.gelu.default), (0, 1, 2)),
    Case("mul by a number", X, op(aten.mul.Tensor, 3.0), (0, 1, 2)),
    Case("add", ((2, 6, 4), (2, 6, 4)), op(aten.add.Tensor), (0, 1, 2)),
    Case("add, one row for all samples", ((2, 6, 4), (1, 6, 4)), op(aten.add.Tensor), (0, 1, 2)),
    Case("add, fewer axes", ((6, 4), (2, 6, 4)), op(aten.add.Tensor), (0, 1, 2)),
    Case("add, channels only", ((2, 6, 4), (4,)), op(aten.add.Tensor, alpha=2.0), (0, 1, 2)),
    Case("mul, one value for all tokens", ((2, 6, 4), (2, 1, 4)), op(aten.mul.Tensor), (0, 1, 2)),
    Case("mul, outer product", ((2, 6, 1), (2, 1, 4)), op(aten.mul.Tensor), (0, 1, 2)),
    Case("mul by itself", X, lambda call, x: call(aten.mul.Tensor, x, x), (0, 1, 2)),
    Case(
        "add to its own transpose",
        ((2, 4, 4),),
        lambda call, x: call(aten.add.Tensor, x, call(aten.transpose.int, x, 1, 2)),
        (0, 1, 2),
    ),
    Case(
        "where",
        ((2, 6, 4), (6, 1), (1, 1, 4)),
        lambda call, x, y, z: call(aten.where.self, call(aten.gt.Scalar, x, 0), y, z),
        (0, 1, 2),
    ),
    Case("addcmul", ((2, 6, 4), (2, 1, 4), (6, 4)), op(aten.addcmul.default), (0, 1, 2)),
    Case("pointwise along an axis of 1", ((2, 1, 4), (2, 1, 4)), op(aten.add.Tensor), (0, 2)),
    Case("mm", ((6, 4), (4, 5)), op(aten.mm.default), (0, 1)),
    Case("mm by itself", ((4, 4),), lambda call, x: call(aten.mm.default, x, x), ()),
    Case("addmm", ((5,), (6, 4), (4, 5)), op(aten.addmm.default), (0,)),
    Case("addmm, a bias of two axes", ((6, 5), (6, 4), (4, 5)), op(aten.addmm.default), ()),
    Case("packed weight", ((6, 4), (5,)), packed, (0,)),
    Case("integers", ((6, 4),), integers, (0,)),
    Case("scaled rows", ((6, 16), (6, 1)), scaled, (0,)),
    Case("matmul", ((2, 6, 4), (2, 4, 5)), op(aten.matmul.default), (0, 1, 2)),
    Case("matmul, one weight", ((2, 6, 4), (4, 5)), op(aten.matmul.default), (0, 1, 2)),
    Case(
        "matmul, a wider batch on the right",
        ((6, 4), (2, 4, 5)),
        op(aten.matmul.default),
        (0, 1, 2),
    ),
    Case("matmul, a vector on the left", ((4,), (2, 4, 5)), op(aten.matmul.default), ()),
    Case("matmul, a vector on the right", ((2, 2, 6, 4), (4,)), op(aten.matmul.default), ()),
    Case(
        "matmul, heads broadcast",
        ((2, 3, 6, 4), (2, 1, 4, 5)),
        op(aten.matmul.default),
        (0, 1, 2, 3),
    ),
    Case(
        "matmul, a batch on the left",
        ((2, 3, 6, 4), (3, 4, 5)),
        op(aten.matmul.default),
        (0, 1, 2, 3),
    ),
    Case("bmm", ((2, 6, 4), (2, 4, 5)), op(aten.bmm.default), (0, 1, 2)),
    Case("baddbmm", ((1, 5), (2, 6, 4), (2, 4, 5)), op(aten.baddbmm.default), (0, 1, 2)),
    Case(
        "baddbmm, as many as there are",
        ((2, 6, 5), (2, 6, 4), (2, 4, 5)),
        op(aten.baddbmm.default),
        (0, 1, 2),
    ),
    Case("conv1d, kernel 1", ((2, 4, 6), (5, 4, 1), (5,)), op(aten.conv1d.default), (0, 2)),
    Case(
        "conv2d, kernel 1", ((2, 4, 6, 3), (5, 4, 1, 1), (5,)), op(aten.conv2d.default), (0, 2, 3)
    ),
    Case(
        "conv3d, kernel 1",
        ((2, 4, 2, 6, 3), (5, 4, 1, 1, 1)),
        op(aten.conv3d.default),
        (0, 2, 3, 4),
    ),
    Case(
        "conv2d, kernel 3",
        ((2, 4, 6, 6), (5, 4, 3, 3)),
        op(aten.conv2d.default, None, [1, 1], [1, 1]),
        (),
    ),
    Case(
        "conv1d, kernel 1, stride 2", ((2, 4, 6), (5, 4, 1)), op(aten.conv1d.default, None, [2]), ()
    ),
    Case(
        "attention", ((2, 3, 6, 4),) * 3, op(aten.scaled_dot_product_attention.default), (0, 1, 2)
    ),
    Case(
        "attention, masked",
        (*(((2, 3, 6, 4),) * 3), (2, 1, 6, 6)),
        op(aten.scaled_dot_product_attention.default),
        (0, 1, 2),
    ),
    Case(
        "attention, one mask",
        (*(((2, 3, 6, 4),) * 3), (1, 1, 1, 6)),
        op(aten.scaled_dot_product_attention.default),
        (0, 1, 2),
    ),
    Case(
        "attention, causal",
        ((2, 3, 6, 4),) * 3,
        op(aten.scaled_dot_product_attention.default, None, 0.0, True),
        (),
    ),
    Case("log_softmax", X, op(aten.log_softmax.int, -1), (0, 1)),
    Case("polar", ((2, 6, 4), (6, 4)), op(aten.polar.default), (0, 1, 2)),
    Case("complex", ((2, 6, 4), (6, 1)), op(aten.complex.default), (0, 1, 2)),
    Case("zeros_like", X, op(aten.zeros_like.default), (0, 1, 2)),
    Case("ones_like", X, op(aten.ones_like.default), (0, 1, 2)),
    Case("full_like", X, op(aten.full_like.default, 3.0), (0, 1, 2)),
    Case("_softmax", X, op(aten._softmax.default, -1, False), (0, 1)),
    Case("glu", X, op(aten.glu.default), (0, 1)),
    Case("mean", X, op(aten.mean.dim, [2]), (0, 1)),
    Case("mean, kept", X, op(aten.mean.dim, [-1], True), (0, 1)),
    Case("mean over the first", X, op(aten.mean.dim, [0]), (0, 1)),
    Case("sum over two", ((2, 3, 6, 4),), op(aten.sum.dim_IntList, [1, -1]), (0, 1)),
    Case("amax, kept", X, op(aten.amax.default, [1], True), (0, 2)),
    Case("vector norm", X, op(aten.linalg_vector_norm.default, 2, [-1], True), (0, 1)),
    Case("narrow", X, op(aten.narrow.default, 2, 1, 2), (0, 1)),
    Case("repeat_interleave", X, op(aten.repeat_interleave.self_int, 2, 1), (0, 2)),
    Case("repeat_interleave of everything", X, op(aten.repeat_interleave.self_int, 2), ()),
    Case("stack, first", ((2, 6, 4), (2, 6, 4)), joined(aten.stack.default), (1, 2, 3)),
    Case("stack, last", ((2, 6, 4), (2, 6, 4)), joined(aten.stack.default, -1), (0, 1, 2)),
    Case("t", ((6, 4),), op(aten.t.default), (0, 1)),
    Case("t of a vector", ((6,),), op(aten.t.default), (0,)),
    Case("squeeze", ((2, 1, 6),), op(aten.squeeze.dim, 1), (0, 1)),
    Case("squeeze, every axis of one", ((1, 2, 1, 6),), op(aten.squeeze.default), (0, 1)),
    Case("flatten", ((2, 6, 2, 2),), op(aten.flatten.using_ints, 2), (0, 1)),
    Case("unflatten", X, op(aten.unflatten.int, 2, [2, 2]), (0, 1)),
    Case("unsafe view", X, op(aten._unsafe_view.default, [2, 6, 2, 2]), (0, 1)),
    Case("to, a layout", X, op(aten.to.dtype_layout, dtype=torch.float64), (0, 1, 2)),
    Case("to, a device", X, op(aten.to.device, torch.device("cpu"), torch.float64), (0, 1, 2)),
    Case("_to_copy", X, op(aten._to_copy.default), (0, 1, 2)),
    Case("alias", X, op(aten.alias.default), (0, 1, 2)),
    Case("detach", X, op(aten.detach.default), (0, 1, 2)),
    Case("select_scatter", ((2, 6, 4), (2, 4)), op(aten.select_scatter.default, 1, 2), (0, 2)),
    Case("slice_scatter", ((2, 6, 4), (2, 6, 2)), op(aten.slice_scatter.default, -1, 1, 3), (0, 1)),
    Case("cumsum", X, op(aten.cumsum.default, 1), ()),
    Case("flip", X, op(aten.flip.default, [1]), (0, 2)),
    Case("roll", X, op(aten.roll.default, [1, 2], [-1, 0]), (1,)),
    Case("roll of everything", X, op(aten.roll.default, [1]), ()),
    Case("pad", X, op(aten.constant_pad_nd.default, [1, 0, 0, 2]), (0,)),
    Case("pad, one axis", X, op(aten.constant_pad_nd.default, [0, 2]), (0, 1)),
    Case("index, last", X, indexed(None, None, [3, 0, 0]), (0, 1)),
    Case("index, middle, two axes", X, indexed(None, [[0, 5], [1, 1], [2, 3]]), (0, 3)),
    Case("index, two side by side", ((2, 6, 4, 3),), indexed(None, [0, 5], [[1], [2]]), (0, 3)),
    Case("index, two apart", ((2, 6, 4),), indexed([0, 1, 1], None, [2, 3, 0]), (1,)),
    Case("index by a mask", X, indexed(None, [True, False, True, True, False, True]), ()),
    Case("index_select", X, selected([3, 0, 0]), (0, 1)),
    Case("gather", ((2, 6, 4), (2, 6, 5)), gathered, (0, 1)),
    Case("gather from more samples", ((2, 6, 4), (1, 6, 5)), gathered, (1,)),
    Case("unsafe_split", X, item(aten.unsafe_split.Tensor, 1, 3, 1), (0, 2)),
    Case("squeeze, two axes", ((1, 2, 1, 6),), op(aten.squeeze.dims, [0, 2]), (0, 1)),
    Case("group_norm", ((4, 6),), op(aten.group_norm.default, 2), (0,)),
    Case("group_norm over positions", ((2, 4, 6),), op(aten.group_norm.default, 2), (0,)),
    Case("batch_norm", (*X, (6,), (6,)), batch_norm(False), (0, 2)),
    Case("batch_norm, learning", (*X, (6,), (6,)), batch_norm(True), ()),
    Case("amin", X, op(aten.amin.default, [2]), (0, 1)),
    Case("max and where", X, item(aten.max.dim, 1, 2), (0, 1)),
    Case("min, kept", X, item(aten.min.dim, 0, 1, True), (0, 2)),
    Case("prod", X, op(aten.prod.dim_int, -1), (0, 1)),
    Case("logsumexp", X, op(aten.logsumexp.default, [-1], True), (0, 1)),
    Case("std", X, op(aten.std.correction, [-1], correction=1, keepdim=True), (0, 1)),
    Case("var", X, op(aten.var.correction, [-1], correction=0), (0, 1)),
    Case("var of everything", X, op(aten.var.correction), ()),
    Case("var_mean", X, item(aten.var_mean.correction, 1, [-1], correction=0), (0, 1)),
    Case("std_mean", X, item(aten.std_mean.correction, 0, [-1], correction=0), (0, 1)),
    Case("norm", X, op(aten.norm.ScalarOpt_dim, 2, [-1], True), (0, 1)),
    Case("prelu", ((2, 6, 4), (1, 6, 1)), op(aten._prelu_kernel.default), (0, 1, 2)),
    Case("rsub", X, op(aten.rsub.Scalar, 1), (0, 1, 2)),
    Case("rsub, a tensor", ((2, 6, 4), (6, 1)), op(aten.rsub.Tensor), (0, 1, 2)),
    Case("lerp", ((2, 6, 4), (2, 6, 4), (2, 1, 1)), op(aten.lerp.Tensor), (0, 1, 2)),
    Case("lerp by a number", ((2, 6, 4), (2, 6, 4)), op(aten.lerp.Scalar, 0.5), (0, 1, 2)),
    Case(
        "masked_fill",
        ((2, 6, 4), (6, 1), ()),
        lambda call, x, y, z: call(aten.masked_fill.Tensor, x, call(aten.gt.Scalar, y, 0), z),
        (0, 1, 2),
    ),
]
