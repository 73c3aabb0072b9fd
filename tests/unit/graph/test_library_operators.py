"""Operators of libraries that quantise: their rules, by brute force, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from tests.unit.graph.test_axes import KEPT, Evaluator, provable
from toca_fx.graph import ops

aten = torch.ops.aten

Call = Callable[..., fx.Node]
Case = tuple[str, tuple[int, ...], Callable[[Call, fx.Node], fx.Node], tuple[int, ...]]


def of(name: str) -> Any:
    space, _, packet = name.partition("::")
    return getattr(getattr(torch.ops, space), packet).default


def row(name: str, *rest: Any, item: int | None = None, dtype: Any = torch.float32) -> Any:
    """A node of an operator on its input, and on constants that ``rest`` are."""

    def build(call: Call, x: fx.Node) -> fx.Node:
        given = [call(one.clone) if isinstance(one, torch.Tensor) else one for one in rest]
        found = call(of(name), call(aten.to.dtype, x, dtype), *given)
        return found if item is None else call(ops.operator.getitem, found, item)

    return build


def quantised(call: Call, x: fx.Node) -> fx.Node:
    """In 8 bits by scales of its own, one for each token."""
    x = call(aten.to.dtype, x, torch.float32)
    block = [1, 1, 4]
    scales = call(
        of("torchao::choose_qparams_affine"),
        x,
        "SYMMETRIC",
        block,
        torch.int8,
        -128,
        127,
        1e-7,
        torch.float32,
        torch.int8,
        True,
    )
    scale, zero = (call(ops.operator.getitem, scales, at) for at in (0, 1))
    return call(of("torchao::quantize_affine"), x, block, scale, zero, torch.int8, -128, 127)


def in_float8(block: list[int]) -> Any:
    def build(call: Call, x: fx.Node) -> fx.Node:
        x = call(aten.to.dtype, x, torch.float32)
        scales = call(of("torchao::choose_scale_float8"), x, block)
        name = "torchao::quantize_affine_float8_non_decomposed"
        return call(aten.to.dtype, call(of(name), x, scales), torch.float32)

    return build


def scaled_rows(call: Call, x: fx.Node) -> fx.Node:
    both = call(of("bitsandbytes::int8_vectorwise_quant"), call(aten.to.dtype, x, torch.half), 0.0)
    bits, scales = (call(ops.operator.getitem, both, at) for at in (0, 1))
    weight = call(torch.full, (5, 4), 3, dtype=torch.int8)
    columns = call(torch.ones, 5)
    product = call(of("bitsandbytes::int8_linear_matmul"), bits, weight)
    apart = call(of("bitsandbytes::int8_mm_dequant"), product, scales, columns)
    joint = call(of("bitsandbytes::int8_scaled_mm"), bits, weight, scales, columns)
    return call(aten.add.Tensor, apart, joint)


def four_bits(call: Call, x: fx.Node) -> fx.Node:
    made = torch.ops.bitsandbytes.quantize_4bit.default(torch.ones(5, 64), 64, "nf4", torch.uint8)
    weight, scales = (call(one.clone) for one in made)
    x = call(aten.to.dtype, x, torch.float32)
    return call(of("bitsandbytes::gemm_4bit"), x, weight, [5, 64], scales, 64, "nf4")


_BYTES = torch.full((5, 4), 3, dtype=torch.int8)
# Scales that are one for an axis are not computed again for some of its positions.
CASES: dict[str, Case] = {
    "torchao, per token": ("torchao.quantization", (2, 6, 4), quantised, (0, 1)),
    "torchao, float8": ("torchao.quantization", (2, 6, 4), in_float8([1, 1, 4]), (0, 1, 2)),
    "torchao, float8, one scale": (
        "torchao.quantization",
        (2, 6, 4),
        in_float8([2, 6, 4]),
        (0, 1, 2),
    ),
    "quanto": ("optimum.quanto", (6, 4), row("quanto::qbytes_mm", _BYTES, torch.ones(5, 1)), (0,)),
    "bitsandbytes, 8 bits": ("bitsandbytes", (6, 4), scaled_rows, (0,)),
    "bitsandbytes, 4 bits": ("bitsandbytes", (2, 6, 64), four_bits, (0, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_slicing_commutes_with_the_operator(case: str) -> None:
    library, shape, build, per_token = CASES[case]
    pytest.importorskip(library)
    evaluator = Evaluator([shape])
    node = build(evaluator.call, *evaluator.inputs)
    value = node.meta["val"]
    assert tuple(axis for axis in range(value.dim()) if provable(node, axis)) == per_token
    for axis in per_token:
        kept = torch.tensor(KEPT[value.shape[axis]])
        expected = value.index_select(axis, kept)
        torch.testing.assert_close(evaluator.restricted(node, axis, kept), expected)


def test_a_name_is_looked_up_without_the_library() -> None:
    assert "quanto::qbytes_mm" in ops.LINEARS
    assert torch.ops.aten.relu.default not in ops.LINEARS
    assert ops.row_of(torch.ops.aten.relu.default) is None
