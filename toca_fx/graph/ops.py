"""Families of operators in pre-dispatch ATen, and what can be told of a node by them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.graph.axes import is_pointwise

aten = torch.ops.aten

ADDS = frozenset({aten.add.Tensor, operator.add})
# One operand in, the same numbers out.
RELAYOUTS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.mT.default,
        aten.permute.default,
        aten.squeeze.dim,
        aten.squeeze.default,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
        aten.dropout.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        operator.getitem,
    }
)
LINEAR_POINTWISE = frozenset(
    {
        *ADDS,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.neg.default,
        aten.clamp.default,
        aten.where.self,
        operator.mul,
        operator.sub,
        operator.truediv,
    }
)
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default})
PACKED = frozenset({aten._weight_int8pack_mm.default, aten._weight_int4pack_mm.default})
CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})


def linear_input(node: fx.Node) -> fx.Node | None:
    """What a linear layer reads; None if ``node`` is no linear layer."""
    source: Any = None
    if node.target is aten.linear.default or node.target in PACKED:
        source = node.args[0]
    elif node.target in (aten.mm.default, aten.matmul.default):
        weight = node.args[1]
        if (
            isinstance(weight, fx.Node)
            and is_constant(weight)
            and len(weight.meta["val"].shape) == 2
        ):
            source = node.args[0]
    elif node.target is aten.addmm.default:
        source = node.args[1]
    elif node.target in CONVOLUTIONS and is_constant(node.args[1]):
        weight = node.args[1]
        if isinstance(weight, fx.Node) and all(size == 1 for size in weight.meta["val"].shape[2:]):
            source = node.args[0]
    return source if isinstance(source, fx.Node) and not is_constant(source) else None


def is_constant(value: object) -> bool:
    """Whether a value depends on parameters, buffers and numbers only."""
    return not isinstance(value, fx.Node) or bool(value.meta.get("constant"))


def is_cheap(node: fx.Node) -> bool:
    """Whether a node only moves numbers or combines them position by position."""
    return node.target in RELAYOUTS or is_pointwise(node)


def is_activation(node: fx.Node) -> bool:
    """Whether a node is a pointwise function that no linear layer could absorb."""
    return (
        is_pointwise(node) and node.target not in LINEAR_POINTWISE and node.target not in RELAYOUTS
    )


def activations(node: fx.Node) -> Iterator[fx.Node]:
    """The operands of ``node`` that are tensors and depend on the model's inputs."""
    for operand in node.all_input_nodes:
        value = operand.meta.get("val")
        if isinstance(value, (Tensor, list, tuple)) and not is_constant(operand):
            yield operand
