"""The operators of pre-dispatch ATen that are known, and what a node's operator says of it.

``OPS`` has one row per operator: the rule for its axes, and the families that it belongs to. An
operator that the table lacks mixes all axes and belongs to no family, unless torch tags it as
pointwise. Operators of libraries, which may not be installed, are in it by name. Where one rule or
family is wrong, results are wrong: tests/unit/graph/test_axes.py tries
every rule on numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.graph import axes, few_bits
from toca_fx.graph.axes import Axes, Rule
from toca_fx.graph.names import Members, namespace, qualified_name
from toca_fx.torch_private import (
    CustomOpDef,
    OpOverload,
    OpOverloadPacket,
    argument_names,
    custom_overload,
)

aten = torch.ops.aten

# An operator that is given code, for each score and for the mask: ``flex_attention``. It returns
# the result, a log-sum-exp and the largest scores.
FLEX = torch.ops.higher_order.flex_attention


class Family(Flag):
    """What operators have in common. SAME to PART have one operand and compute nothing."""

    NONE = 0
    SAME = auto()  # the tensor as it is, perhaps copied or in another dtype
    RESHAPE = auto()  # other axes, the elements in the same row-major order
    PERMUTE = auto()  # the axes in another order
    EXPAND = auto()  # more positions, all alike
    PART = auto()  # some of the positions, or a list of parts
    REGROUP = auto()  # axes may be joined or split
    SIZED = auto()  # the second argument spells out the sizes of the output
    SPLIT = auto()  # a list of parts along the axis that is the third argument
    LINEAR = auto()  # a linear layer, whatever its weight depends on
    PRODUCT = auto()  # products of two tensors, axes in front of the matrices shared
    MM = auto()  # products of two matrices: a linear layer if the second is a weight
    CONVOLUTION = auto()
    QUANTIZE = auto()  # the first operand in a few bits, times scales: part of a linear layer
    SCALE = auto()  # the scales for that
    ATTENTION = auto()
    SOFTMAX = auto()
    NORM = auto()
    REDUCTION = auto()
    ADD = auto()
    LINEAR_POINTWISE = auto()  # what a linear layer could absorb
    ACTIVATION = auto()  # what it could not, beyond the pointwise functions


@dataclass(frozen=True)
class Op:
    """A row of the table: the rule for the axes and the families.

    The rule says which axes of the operands an axis of the output comes from; None if all are
    mixed.
    """

    axis_rule: Rule | None
    families: Family = Family.NONE


_REGROUPED = Op(axes.view, Family.RESHAPE | Family.REGROUP)
_VIEW = Op(axes.view, Family.RESHAPE | Family.REGROUP | Family.SIZED)
_SAME = Op(axes.same_axis, Family.SAME)
_SPLIT = Op(axes.along_dim(2, 0), Family.PART | Family.SPLIT)
_LINEAR = Op(axes.all_but_last, Family.LINEAR)
_PACKED = Op(axes.mm, Family.LINEAR)
_INTEGERS = Op(axes.matmul, Family.MM)
_SCALED = Op(few_bits.rows_of(0, 2), Family.LINEAR)
_SCALES = Op(few_bits.of_blocks, Family.SCALE)
_QUANTIZED = Op(few_bits.quantized, Family.QUANTIZE)
_CONVOLUTION = Op(axes.convolution, Family.CONVOLUTION)
_ADD = Op(axes.pointwise, Family.ADD | Family.LINEAR_POINTWISE)
_ABSORBED = Op(axes.pointwise, Family.LINEAR_POINTWISE)

OPS: Mapping[Any, Op] = {
    aten.view.default: _VIEW,
    aten.reshape.default: _VIEW,
    aten._unsafe_view.default: _VIEW,
    aten.flatten.using_ints: _REGROUPED,
    aten.unflatten.int: _REGROUPED,
    aten.squeeze.dim: Op(axes.view, Family.RESHAPE),
    aten.squeeze.dims: Op(axes.view, Family.RESHAPE),
    aten.squeeze.default: Op(axes.view, Family.RESHAPE),
    aten.unsqueeze.default: Op(axes.unsqueeze, Family.RESHAPE),
    aten.transpose.int: Op(axes.transpose, Family.PERMUTE),
    aten.t.default: Op(axes.matrix, Family.PERMUTE),
    aten.permute.default: Op(axes.permute, Family.PERMUTE),
    aten.expand.default: Op(axes.expand, Family.EXPAND | Family.SIZED),
    aten.contiguous.default: _SAME,
    aten.clone.default: _SAME,
    aten.alias.default: _SAME,
    aten.detach.default: _SAME,
    aten.to.dtype: _SAME,
    aten.to.dtype_layout: _SAME,
    aten.to.device: _SAME,
    aten._to_copy.default: _SAME,
    aten.dropout.default: _SAME,
    aten.slice.Tensor: Op(axes.along_dim(1, 0), Family.PART),
    aten.narrow.default: Op(axes.along_dim(1, 0), Family.PART),
    aten.select.int: Op(axes.select, Family.PART),
    aten.unbind.int: Op(axes.select, Family.PART),
    aten.chunk.default: _SPLIT,
    aten.split.Tensor: _SPLIT,
    aten.split_with_sizes.default: _SPLIT,
    aten.unsafe_split.Tensor: _SPLIT,
    operator.getitem: Op(axes.same_axis, Family.PART),
    aten.view_as_complex.default: Op(axes.same_axis),
    aten.view_as_real.default: Op(axes.all_but_last),
    aten.repeat.default: Op(axes.repeat),
    aten.repeat_interleave.self_int: Op(axes.along_dim(2, 0)),
    aten.roll.default: Op(axes.apart_from(2)),
    aten.flip.default: Op(axes.apart_from(1)),
    aten.index.Tensor: Op(axes.index),
    aten.index_select.default: Op(axes.along_dim(1, 0)),
    aten.gather.default: Op(axes.gather),
    aten.constant_pad_nd.default: Op(axes.pad),
    aten.cat.default: Op(axes.cat),
    aten.stack.default: Op(axes.stack),
    aten.slice_scatter.default: Op(axes.slice_scatter),
    aten.select_scatter.default: Op(axes.select_scatter),
    aten.linear.default: _LINEAR,
    aten._weight_int8pack_mm.default: _PACKED,
    aten._weight_int4pack_mm.default: _PACKED,
    aten.addmm.default: Op(axes.addmm, Family.LINEAR),
    aten.mm.default: Op(axes.matmul, Family.MM),
    aten._int_mm.default: _INTEGERS,
    aten._scaled_mm.default: _SCALED,
    "torchao::int_matmul": _INTEGERS,
    "torchao::int_scaled_matmul": _SCALED,
    "torchao::choose_qparams_affine": _SCALES,
    "torchao::choose_scale_float8": _SCALES,
    "torchao::quantize_affine": _QUANTIZED,
    "torchao::quantize_affine_float8_non_decomposed": _QUANTIZED,
    "quanto::qbytes_mm": _PACKED,
    "bitsandbytes::gemm_4bit": _LINEAR,
    "bitsandbytes::gemv_4bit": _LINEAR,
    "bitsandbytes::int8_linear_matmul": _LINEAR,
    "bitsandbytes::int8_scaled_mm": _SCALED,
    "bitsandbytes::int8_mm_dequant": Op(few_bits.rows_of(0, 1)),
    "bitsandbytes::int8_vectorwise_quant": Op(few_bits.quantized_rows, Family.QUANTIZE),
    aten.matmul.default: Op(axes.matmul, Family.MM | Family.PRODUCT),
    aten.bmm.default: Op(axes.matmul, Family.PRODUCT),
    aten.baddbmm.default: Op(axes.baddbmm, Family.PRODUCT),
    aten.conv1d.default: _CONVOLUTION,
    aten.conv2d.default: _CONVOLUTION,
    aten.conv3d.default: _CONVOLUTION,
    aten.scaled_dot_product_attention.default: Op(axes.attention, Family.ATTENTION),
    FLEX: Op(None, Family.ATTENTION),
    aten.softmax.int: Op(axes.along_dim(1, -1), Family.SOFTMAX),
    aten._softmax.default: Op(axes.along_dim(1, -1), Family.SOFTMAX),
    aten.log_softmax.int: Op(axes.along_dim(1, -1)),
    aten.layer_norm.default: Op(axes.layer_norm, Family.NORM),
    aten.rms_norm.default: Op(axes.layer_norm, Family.NORM),
    aten.group_norm.default: Op(axes.samples, Family.NORM),
    aten.batch_norm.default: Op(axes.batch_norm, Family.NORM),
    aten.mean.dim: Op(axes.reduction(1), Family.REDUCTION),
    aten.sum.dim_IntList: Op(axes.reduction(1), Family.REDUCTION),
    aten.amax.default: Op(axes.reduction(1), Family.REDUCTION),
    aten.amin.default: Op(axes.reduction(1), Family.REDUCTION),
    aten.max.dim: Op(axes.reduction(1)),
    aten.min.dim: Op(axes.reduction(1)),
    aten.prod.dim_int: Op(axes.reduction(1), Family.REDUCTION),
    aten.logsumexp.default: Op(axes.reduction(1), Family.REDUCTION),
    aten.std.correction: Op(axes.reduction(1), Family.REDUCTION),
    aten.var.correction: Op(axes.reduction(1), Family.REDUCTION),
    aten.std_mean.correction: Op(axes.reduction(1)),
    aten.var_mean.correction: Op(axes.reduction(1)),
    aten.norm.ScalarOpt_dim: Op(axes.reduction(2), Family.REDUCTION),
    aten.linalg_vector_norm.default: Op(axes.reduction(2), Family.REDUCTION),
    aten.glu.default: Op(axes.along_dim(1, -1), Family.ACTIVATION),
    aten.hardswish.default: Op(axes.pointwise, Family.ACTIVATION),  # which torch does not tag
    aten.log_sigmoid.default: Op(axes.pointwise, Family.ACTIVATION),  # nor this
    aten._prelu_kernel.default: Op(axes.pointwise, Family.ACTIVATION),  # nor this
    aten.zeros_like.default: Op(axes.pointwise),
    aten.ones_like.default: Op(axes.pointwise),
    aten.full_like.default: Op(axes.pointwise),
    aten.polar.default: Op(axes.pointwise),
    aten.complex.default: Op(axes.pointwise),
    aten.add.Tensor: _ADD,
    operator.add: _ADD,
    aten.add.Scalar: _ABSORBED,
    aten.sub.Tensor: _ABSORBED,
    aten.sub.Scalar: _ABSORBED,
    operator.sub: _ABSORBED,
    aten.mul.Tensor: _ABSORBED,
    aten.mul.Scalar: _ABSORBED,
    operator.mul: _ABSORBED,
    aten.div.Tensor: _ABSORBED,
    aten.div.Scalar: _ABSORBED,
    operator.truediv: _ABSORBED,
    aten.rsub.Tensor: _ABSORBED,
    aten.rsub.Scalar: _ABSORBED,
    aten.addcmul.default: _ABSORBED,
    aten.addcdiv.default: _ABSORBED,
    aten.lerp.Tensor: _ABSORBED,
    aten.lerp.Scalar: _ABSORBED,
    aten.neg.default: _ABSORBED,
    aten.clamp.default: _ABSORBED,
    aten.where.self: _ABSORBED,
    aten.masked_fill.Scalar: _ABSORBED,
    aten.masked_fill.Tensor: _ABSORBED,
}


def row_of(target: object) -> Op | None:
    """The row of an operator, by itself or by its name; None if the table lacks it."""
    found = OPS.get(target)
    if found is None and namespace(target) not in ("", "aten"):
        found = OPS.get(qualified_name(target))
    return found


def _members(families: Family) -> Members:
    """The operators of any of ``families``."""
    return Members(target for target, row in OPS.items() if row.families & families)


# One operand in, the same numbers out.
RELAYOUTS = _members(Family.SAME | Family.RESHAPE | Family.PERMUTE | Family.EXPAND | Family.PART)
SAME = _members(Family.SAME)
RESHAPES = _members(Family.RESHAPE)
PERMUTES = _members(Family.PERMUTE)
REGROUPS = _members(Family.REGROUP)
SIZED = _members(Family.SIZED)
SPLITS = _members(Family.SPLIT)
LINEARS = _members(Family.LINEAR)
MMS = _members(Family.MM)
PRODUCTS = _members(Family.PRODUCT)
CONVOLUTIONS = _members(Family.CONVOLUTION)
ATTENTIONS = _members(Family.ATTENTION)
QUANTIZERS = _members(Family.QUANTIZE)
SCALES = _members(Family.SCALE)
# What a model spends its time on.
WORK = LINEARS | MMS | PRODUCTS | CONVOLUTIONS | ATTENTIONS
SOFTMAXES = _members(Family.SOFTMAX)
NORMS = _members(Family.NORM)
REDUCTIONS = _members(Family.REDUCTION)
ADDS = _members(Family.ADD)
LINEAR_POINTWISE = _members(Family.LINEAR_POINTWISE)
ACTIVATIONS = _members(Family.ACTIVATION)


def operands(node: fx.Node, axis: int) -> Axes | None:
    """The operands that carry an axis of the output, with the axis in each.

    None if positions along the axis are mixed.
    """
    rule = axis_rule(node)
    return rule(node, axis) if rule is not None else None


def axis_rule(node: fx.Node) -> Rule | None:
    """The rule of a node's operator; None if it has none."""
    row = row_of(node.target)
    if row is not None:
        return row.axis_rule
    return axes.pointwise if is_pointwise(node) else None


def linear_input(node: fx.Node) -> fx.Node | None:
    """What a linear layer reads; None if ``node`` is no linear layer.

    A product is one if one of its two operands is a weight, and it is no outer product, as of
    positions and frequencies. If it reads few bits, it is what these were made of.
    """
    source = _multiplied(node)
    quantizer = _quantizer(source)
    return axes.first_operand(quantizer) if quantizer is not None else source


def quantizer_of(linear: fx.Node) -> fx.Node | None:
    """The operator that puts what a linear layer reads into a few bits; None if there is none."""
    return _quantizer(_multiplied(linear))


def _quantizer(source: fx.Node | None) -> fx.Node | None:
    """The quantizer that ``source`` comes from; constants may have been added, as to unsign it."""
    while source is not None and source.target not in QUANTIZERS:
        read = list(activations(source))
        moves = source.target in RELAYOUTS or source.target in LINEAR_POINTWISE
        source = read[0] if moves and len(read) == 1 else None
    return source


def _multiplied(node: fx.Node) -> fx.Node | None:
    """The operand of a linear layer that is no weight; None if ``node`` is no linear layer."""
    source: Any = None
    if node.target in LINEARS:
        source = node.args[1 if node.target is aten.addmm.default else 0]
    elif node.target in MMS | PRODUCTS:
        left, right = node.args[-2:]
        is_outer = isinstance(left, fx.Node) and axes.shape_of(left)[-1] == 1
        if is_constant(left) != is_constant(right) and not is_outer:
            source = right if is_constant(left) else left
    elif node.target in CONVOLUTIONS and is_constant(node.args[1]):
        weight = node.args[1]
        if isinstance(weight, fx.Node) and all(size == 1 for size in weight.meta["val"].shape[2:]):
            source = node.args[0]
    return source if isinstance(source, fx.Node) and not is_constant(source) else None


def is_constant(value: object) -> bool:
    """Whether a value depends on parameters, buffers and numbers only."""
    return not isinstance(value, fx.Node) or bool(value.meta.get("constant"))


def is_scale(node: fx.Node) -> bool:
    """Whether a node makes the scales that a linear layer reads beside a few bits."""
    return node.target in SCALES or node.target in QUANTIZERS


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the output depends only on the elements at its own position."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _is_row_pointwise(node)


def _is_row_pointwise(node: fx.Node) -> bool:
    """Whether the table says so: Python's operators have no tags."""
    row = OPS.get(node.target)
    return row is not None and row.axis_rule is axes.pointwise


def is_cheap(node: fx.Node) -> bool:
    """Whether a node only moves numbers or combines them position by position."""
    return node.target in RELAYOUTS or is_pointwise(node)


def is_activation(node: fx.Node) -> bool:
    """Whether a node is a function that no linear layer could absorb: pointwise, or gated."""
    return node.target in ACTIVATIONS or (
        is_pointwise(node) and node.target not in LINEAR_POINTWISE and node.target not in RELAYOUTS
    )


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def overloads_of(op: object) -> tuple[OpOverload, ...]:
    """The targets that nodes of a graph may have for a call of ``op``.

    ``op`` is an operator of ``torch.ops`` or comes from ``torch.library.custom_op``; () if it is
    neither.
    """
    if isinstance(op, CustomOpDef):
        return (custom_overload(op),)
    if isinstance(op, OpOverloadPacket):
        return tuple(getattr(op, name) for name in op.overloads())  # type: ignore[no-untyped-call]
    return (op,) if isinstance(op, OpOverload) else ()


def argument(node: fx.Node, *names: str) -> Any:
    """The value of the first argument of a node's operator that has one of ``names``.

    None if it is left out, or if there is no such argument.
    """
    if not isinstance(node.target, OpOverload):
        return None
    for position, name in enumerate(argument_names(node.target)):
        if name in names:
            return node.kwargs.get(name, node.args[position] if position < len(node.args) else None)
    return None


def activations(node: fx.Node) -> Iterator[fx.Node]:
    """The operands of ``node`` that are tensors and depend on the model's inputs."""
    for operand in node.all_input_nodes:
        value = operand.meta.get("val")
        if isinstance(value, (Tensor, list, tuple)) and not is_constant(operand):
            yield operand
