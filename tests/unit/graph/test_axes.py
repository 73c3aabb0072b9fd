"""Every rule by brute force: slicing the result of an operator equals applying it to the operands
sliced as the rule says.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.unit.graph.operators import CASES, Case, X
from toca_fx.graph import axes, ops

aten = torch.ops.aten

KEPT = {1: [0], 2: [1], 3: [2, 0], 4: [3, 1, 1], 5: [4, 0], 6: [1, 5, 2, 2], 12: [11, 0, 5]}


class Evaluator:
    """Nodes with values, and their values for some positions along an axis by the rules."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.graph = fx.Graph()
        generator = torch.Generator().manual_seed(0)
        self.inputs = []
        for number, shape in enumerate(shapes):
            node = self.graph.placeholder(f"input_{number}")
            node.meta["val"] = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.inputs.append(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def restricted(self, node: fx.Node, axis: int, kept: Tensor) -> Any:
        """The value of ``node`` at ``kept`` along ``axis``, computed from operands restricted
        likewise.
        """
        if node.op == "placeholder":
            return node.meta["val"].index_select(axis, kept)
        operands = ops.operands(node, axis)
        assert operands is not None
        values = {
            operand: self.restricted(operand, operand_axis, kept)
            for operand, operand_axis in operands.items()
        }
        args, kwargs = node.args, node.kwargs
        if node.target in ops.SIZED:
            args = (args[0], axes.resized(node, axis, len(kept)), *args[2:])
        args, kwargs = fx.map_arg(
            (args, kwargs), lambda operand: values.get(operand, operand.meta["val"])
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]


def provable(node: fx.Node, axis: int) -> bool:
    """Whether the rules lead from ``axis`` of ``node`` to the inputs."""
    if node.op == "placeholder":
        return True
    operands = ops.operands(node, axis)
    return operands is not None and all(provable(*operand) for operand in operands.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_slicing_commutes_with_the_operator(case: Case) -> None:
    evaluator = Evaluator(case.shapes)
    node = case.build(evaluator.call, *evaluator.inputs)
    value = node.meta["val"]
    found = tuple(axis for axis in range(value.dim()) if provable(node, axis))
    assert found == case.per_token
    for axis in found:
        kept = torch.tensor(KEPT[value.shape[axis]])
        expected = value.index_select(axis, kept)
        assert torch.allclose(
            evaluator.restricted(node, axis, kept), expected, rtol=0, atol=1e-12
        ), f"axis {axis}"


def test_the_table_is_covered() -> None:
    tried = set()
    for case in CASES:
        evaluator = Evaluator(case.shapes)
        case.build(evaluator.call, *evaluator.inputs)
        tried |= {node.target for node in evaluator.graph.nodes}
    # One rule serves both packed products; that with 4 bits runs on accelerators only.
    tagged = {op for op in ops.OPS if torch.Tag.pointwise in getattr(op, "tags", ())}
    functions = {op for op in ops.OPS if op in vars(operator).values()}
    ruled = {target for target, row in ops.OPS.items() if row.axis_rule is not None}
    ruled -= tagged | functions - {operator.getitem}
    ruled = {target for target in ruled if not isinstance(target, str)}  # test_library_operators
    assert ruled - tried == {aten._weight_int4pack_mm.default}
    assert ops.OPS[aten._weight_int4pack_mm.default] is ops.OPS[aten._weight_int8pack_mm.default]


def test_a_placeholder_has_no_operands() -> None:
    assert ops.operands(Evaluator(X).inputs[0], 1) is None


def test_an_operand_shared_by_every_token_is_left_as_it_is() -> None:
    evaluator = Evaluator(((2, 6, 4), (2, 1, 4), (4,)))
    x, shift, scale = evaluator.inputs
    assert ops.operands(evaluator.call(aten.add.Tensor, x, shift), 1) == {x: 1}
    assert ops.operands(evaluator.call(aten.mul.Tensor, scale, x), 1) == {x: 1}
    assert ops.operands(evaluator.call(aten.add.Tensor, x, shift), 0) == {x: 0, shift: 0}


def test_a_list_has_no_shape() -> None:
    evaluator = Evaluator(X)
    with pytest.raises(TypeError, match="not a tensor"):
        axes.shape_of(evaluator.call(aten.chunk.default, evaluator.inputs[0], 2))
