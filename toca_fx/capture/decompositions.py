"""Operators that torch itself makes of others: they are traced as what they are made of.

They are other spellings, ``movedim`` of ``permute``, ``tensor_split`` of ``slice``, ``einsum`` of
``bmm``: whoever looks at a graph meets the operators of ``graph.ops`` only, and no rule is written
twice. Those that torch makes of others, and for which there is a rule of their own (``linear``,
``chunk``), stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from toca_fx.graph.ops import overloads_of
from toca_fx.torch_private import OpOverload, is_mutable

aten = torch.ops.aten

_SPELLINGS = (
    # Axes in another order.
    *(aten.movedim, aten.moveaxis, aten.swapaxes, aten.swapdims),
    *(aten.mT, aten.mH, aten.matrix_H, aten.adjoint, aten.numpy_T),
    # Other axes, more positions.
    *(aten.view_as, aten.reshape_as, aten.ravel),
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
    *(aten.einsum, aten.inner, aten.tensordot, aten.outer, aten.kron),
    *(aten.linalg_matmul, aten.linalg_multi_dot, aten.chain_matmul, aten.linalg_vecdot),
)

DECOMPOSITIONS: Mapping[OpOverload, Callable[..., Any]] = {
    overload: overload.decompose
    for spelling in _SPELLINGS
    for overload in overloads_of(spelling)
    if not is_mutable(overload)
}
