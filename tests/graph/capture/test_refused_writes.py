"""Writes that cannot be followed are refused, and the error says why."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.graph.capture.writes import Outer, Outputs, Writing, traced
from toca_fx.diagnostics import UnsupportedModelError


def test_the_refusal_says_what_where_why_and_what_to_do() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        traced(Outer(lambda x, y: y.mul_(2)))
    message = re.sub(r"at /.*/test_refused_writes\.py:[0-9]+ ", "at FILE:LINE ", str(caught.value))
    assert message == (
        "the model writes to a tensor in place (aten.mul_.Tensor, in module inner, at FILE:LINE "
        "(traced(Outer(lambda x, y: y.mul_(2))))) and the caller sees that memory; write it "
        "without the trailing underscore, or exclude the module from compilation"
    )


def to_the_input(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    y[:, 0] = 0
    return x


def to_a_view_of_the_input(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    y.view(12, 8).transpose(0, 1)[1:].mul_(2)
    return x


def to_a_parameter(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    return x * module.weight.mul_(2)


def to_a_diagonal_of_a_buffer(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    module.table.diagonal().mul_(2)
    return x * module.table


def random_numbers(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    return x.normal_()


def to_an_out_argument(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    result = torch.empty_like(x)
    torch.mul(x, y, out=result)
    return result


def to_a_diagonal(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    x.diagonal(0, 1, 2).mul_(2)
    return x


def to_memory_by_its_strides(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    x.as_strided((3,), (1,)).zero_()
    return x


def to_one_of_two_halves(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    left, right = x.chunk(2, 1)
    left.mul_(2)
    return left, right


def to_several_tensors(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    torch._foreach_mul_([x], 2.0)
    return x


def behind_the_graphs_back(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    y.data[:, 1:3] = x[:, :2]
    return x


REFUSED: dict[Callable[..., Outputs], str] = {
    to_the_input: r"aten.fill_.* the caller sees that memory",
    to_a_view_of_the_input: r"aten.mul_.Tensor.* the caller sees that memory",
    to_a_parameter: r"aten.mul_.Tensor.* the caller sees that memory",
    to_a_diagonal_of_a_buffer: r"aten.mul_.* through aten.diagonal.default",
    random_numbers: r"aten.normal_.default.* it has no counterpart that returns a new tensor",
    to_an_out_argument: r"aten.mul.out.* it has no counterpart that returns a new tensor",
    to_a_diagonal: r"aten.mul_.Tensor.* through aten.diagonal.default, which cannot be followed",
    to_memory_by_its_strides: (
        r"aten.zero_.default.* it goes through aten.as_strided.default, which cannot be followed"
    ),
    to_one_of_two_halves: r"aten.mul_.Tensor.* it is also read as getitem_1",
    to_several_tensors: r"aten._foreach_mul_.Scalar.* what it writes to is no tensor of the graph",
    behind_the_graphs_back: r"aten.copy_.default.* the caller sees that memory",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_a_write_that_cannot_be_followed_is_refused(write: Callable[..., Outputs]) -> None:
    module = Writing(lambda x, y: x)
    module.write = lambda x, y: write(module, x, y)
    with pytest.raises(
        UnsupportedModelError, match=rf"^the model writes to a tensor in place \({REFUSED[write]}"
    ):
        traced(module)
