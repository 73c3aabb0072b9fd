"""Writes in place become values: the graph computes what the module does, writes to nothing, and
refuses what it cannot follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.helpers import capture
from toca_fx.capture.aten import to_aten
from toca_fx.capture.functionalize import is_mutable
from toca_fx.diagnostics import UnsupportedModelError

aten = torch.ops.aten

Outputs = Tensor | tuple[Tensor, ...]
Write = Callable[..., Outputs]

# What is no arithmetic and no write: views, and the numbers in them.
QUIET = {
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
    aten.swapaxes.default,
    aten.movedim.int,
    aten.mT.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}


class Writing(nn.Module):
    """``write(x * 2, y)``: the doubled x is the model's own memory, y and the attributes are the
    caller's.
    """

    table: Tensor

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write
        self.weight = nn.Parameter(torch.ones(8, dtype=torch.float64), requires_grad=False)
        self.register_buffer("table", torch.ones(6, 8, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Outputs:
        return self.write(x * 2, y)


class Outer(nn.Module):
    """Writes in a submodule."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.inner = Writing(write)

    def forward(self, x: Tensor, y: Tensor) -> Outputs:
        return self.inner(x, y)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 6, 8, generator=generator, dtype=torch.float64)
    return x, y


def traced(module: nn.Module) -> tuple[fx.GraphModule, list[Any]]:
    captured, given = capture(module, *inputs())
    return to_aten(captured, given), given


def operators(graph: fx.Graph) -> list[Any]:
    """The operators that compute something, in order, without the doubling that comes first."""
    found = [
        node.target
        for node in graph.nodes
        if node.op == "call_function" and node.target not in QUIET
    ]
    assert found.pop(0) is aten.mul.Tensor
    return found


def assert_equal(module: nn.Module) -> fx.Graph:
    """The graph and the module give the same numbers in the same dtypes; nothing in the graph
    writes.
    """
    graph, given = traced(module)
    before = [value.clone() for value in given]
    expected = module(*inputs())
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = graph(*given)
    assert [value.dtype for value in found] == [value.dtype for value in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "the inputs stay"
    assert not any(is_mutable(node) for node in graph.graph.nodes)
    return graph.graph


# One write; x is returned


def slice_of_tokens(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4] = y[:, :3]
    return x


def slice_with_steps(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:6:2] = y[:, :3]
    return x


def empty_slice(x: Tensor, y: Tensor) -> Tensor:
    x[:, 3:3] = y[:, 3:3]
    return x


def one_token(x: Tensor, y: Tensor) -> Tensor:
    x[:, 2] = y[:, 0]
    return x


def one_element(x: Tensor, y: Tensor) -> Tensor:
    x[0, 1, -1] = y[0, 0, 0]
    return x


def number(x: Tensor, y: Tensor) -> Tensor:
    x[:, 2] = 0.5
    return x


def one_row_for_all(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4] = y[:, :1]
    return x


def other_dtype(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4] = y[:, :3].float()
    return x


def all_of_it(x: Tensor, y: Tensor) -> Tensor:
    x.copy_(y)
    return x


def one_row_for_all_of_it(x: Tensor, y: Tensor) -> Tensor:
    x.copy_(y[:, :1])
    return x


def added(x: Tensor, y: Tensor) -> Tensor:
    x.add_(y, alpha=3)
    return x


def added_to_a_slice(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4].add_(y[:, :3], alpha=3)
    return x


def slice_plus_equals(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4] += y[:, :3]
    return x


def channels_multiplied(x: Tensor, y: Tensor) -> Tensor:
    x[:, :, ::2].mul_(3)
    return x


def slice_zeroed(x: Tensor, y: Tensor) -> Tensor:
    x[:, 4:].zero_()
    return x


def activation_in_place(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x, inplace=True) + x


def where_a_mask_is_true(x: Tensor, y: Tensor) -> Tensor:
    x[y > 0] = 0
    return x


def at_indices(x: Tensor, y: Tensor) -> Tensor:
    x.index_copy_(1, y[0, :2, 0].argsort(), y[:, :2])
    return x


def slice_of_a_slice(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:5][:, 1:3] = y[:, :2]
    return x


def slice_of_a_transposition(x: Tensor, y: Tensor) -> Tensor:
    x.transpose(1, 2)[:, :, 1:3].mul_(5)
    return x


def part_of_a_permutation(x: Tensor, y: Tensor) -> Tensor:
    x.permute(-1, 0, 1)[3:5].mul_(5)
    return x


def part_of_swapped_axes(x: Tensor, y: Tensor) -> Tensor:
    x.swapaxes(0, -1)[3:5].mul_(5)
    return x


def part_of_a_matrix_transposed(x: Tensor, y: Tensor) -> Tensor:
    x.mT[:, 3:5].mul_(5)
    return x


def part_of_moved_axes(x: Tensor, y: Tensor) -> Tensor:
    x.movedim(0, -1)[:, 3:5].mul_(5)
    return x


def rows_of_a_view(x: Tensor, y: Tensor) -> Tensor:
    x.view(12, 8)[3:5].mul_(4)
    return x


def rows_of_a_flattened(x: Tensor, y: Tensor) -> Tensor:
    x.flatten(0, 1)[3:5] = 1.0
    return x


def one_head(x: Tensor, y: Tensor) -> Tensor:
    x.unflatten(2, (2, 4))[..., 1, :] = y[..., :4]
    return x


def with_an_axis_more(x: Tensor, y: Tensor) -> Tensor:
    x.unsqueeze(1)[:, :, 2].mul_(3)
    return x


def with_an_axis_less(x: Tensor, y: Tensor) -> Tensor:
    x[:, 2:3].squeeze(1).mul_(3)
    return x


def detached(x: Tensor, y: Tensor) -> Tensor:
    x.detach()[:, 1:3] = y[:, :2]
    return x


SCATTERED = [aten.clone.default, aten.slice_scatter.default]
WRITES: dict[Write, list[Any]] = {
    slice_of_tokens: SCATTERED,
    slice_with_steps: SCATTERED,
    empty_slice: SCATTERED,
    one_token: [aten.clone.default, aten.select_scatter.default],
    one_element: [aten.clone.default, *[aten.select_scatter.default] * 3],
    number: [aten.fill.Tensor, aten.select_scatter.default],
    one_row_for_all: SCATTERED,
    other_dtype: [aten.to.dtype, aten.to.dtype, *SCATTERED],
    all_of_it: [aten.clone.default],
    one_row_for_all_of_it: [aten.clone.default],
    added: [aten.add.Tensor],
    added_to_a_slice: [aten.add.Tensor, aten.slice_scatter.default],
    slice_plus_equals: [aten.add.Tensor, aten.slice_scatter.default, *SCATTERED],
    channels_multiplied: [aten.mul.Tensor, aten.slice_scatter.default],
    slice_zeroed: [aten.zero.default, aten.slice_scatter.default],
    activation_in_place: [aten.silu.default, aten.add.Tensor],
    where_a_mask_is_true: [aten.gt.Scalar, aten.index_put.default],
    at_indices: [aten.argsort.default, aten.index_copy.default],
    slice_of_a_slice: [*SCATTERED, aten.slice_scatter.default],
    slice_of_a_transposition: [
        aten.mul.Tensor,
        aten.slice_scatter.default,
        aten.contiguous.default,
    ],
    part_of_a_permutation: [aten.mul.Tensor, aten.slice_scatter.default, aten.contiguous.default],
    part_of_swapped_axes: [aten.mul.Tensor, aten.slice_scatter.default, aten.contiguous.default],
    part_of_a_matrix_transposed: [
        aten.mul.Tensor,
        aten.slice_scatter.default,
        aten.contiguous.default,
    ],
    part_of_moved_axes: [aten.mul.Tensor, aten.slice_scatter.default, aten.contiguous.default],
    rows_of_a_view: [aten.mul.Tensor, aten.slice_scatter.default],
    rows_of_a_flattened: [aten.fill.Tensor, aten.slice_scatter.default],
    one_head: [aten.clone.default, aten.select_scatter.default],
    with_an_axis_more: [aten.mul.Tensor, aten.select_scatter.default],
    with_an_axis_less: [aten.mul.Tensor, aten.slice_scatter.default],
    detached: SCATTERED,
}


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_becomes_a_value(write: Write) -> None:
    graph = assert_equal(Writing(write))
    assert operators(graph) == WRITES[write]
    x, _ = inputs()
    changed = not torch.equal(Writing(write)(*inputs()), x * 2)
    assert changed == (write is not empty_slice)


def added_in_less_precision(x: Tensor, y: Tensor) -> Tensor:
    return x.bfloat16().add_(y)


def compared(x: Tensor, y: Tensor) -> Tensor:
    return x.gt_(0)


def laid_out_otherwise(x: Tensor, y: Tensor) -> Tensor:
    x.copy_(y.mT.contiguous().mT)
    return x.view(-1)


def through_a_transposition(x: Tensor, y: Tensor) -> Tensor:
    made = x.new_empty(x.shape)
    made.transpose(1, 2).copy_(y.mT)
    return made.view(-1)


@pytest.mark.parametrize(
    "write", [added_in_less_precision, compared, laid_out_otherwise, through_a_transposition]
)
def test_the_memory_keeps_its_dtype_and_its_layout(write: Write) -> None:
    assert_equal(Writing(write))


# Who reads what: before the write the old value, after it the new one, under whatever name


def read_before_and_after(x: Tensor, y: Tensor) -> Outputs:
    view = x[:, 1:3]
    before = view + 1
    x[:, 2] = y[:, 2]
    return before, view + 1, x


def views_that_overlap(x: Tensor, y: Tensor) -> Outputs:
    left, right = x[:, :4], x[:, 2:]
    left.mul_(3)
    return left + 1, right + 1, x


def views_that_do_not(x: Tensor, y: Tensor) -> Outputs:
    left, right = x[:, :3], x[:, 3:]
    left.mul_(3)
    return left + 1, right + 1, x


def a_view_alone_is_read(x: Tensor, y: Tensor) -> Outputs:
    view = x[:, 1:3]
    view.mul_(2)
    return view + 1


def a_view_of_what_is_written_whole(x: Tensor, y: Tensor) -> Outputs:
    view, view_of_view = x.transpose(1, 2), x.transpose(1, 2)[:, 1:3]
    x.mul_(y)
    return view + 1, view_of_view + 1


def what_the_write_returns(x: Tensor, y: Tensor) -> Outputs:
    return x[:, 1:3].mul_(2) + 1, x


def one_write_after_the_other(x: Tensor, y: Tensor) -> Outputs:
    x[:, 1:4] = y[:, :3]
    x[:, 2] = x[:, 3]
    x.view(12, 8)[::5].mul_(2)
    return x


def a_write_to_each_of_several_views(x: Tensor, y: Tensor) -> Outputs:
    tokens = [x[:, i] for i in range(4)]
    for i, token in enumerate(tokens):
        token.copy_(y[:, i] * i)
    return x


def tokens_exchanged(x: Tensor, y: Tensor) -> Outputs:
    first = x[:, 0].clone()
    x[:, 0] = x[:, 1]
    x[:, 1] = first
    return x


def what_was_copied_changes_later(x: Tensor, y: Tensor) -> Outputs:
    other = y * 3
    x.copy_(other)
    other.mul_(0)
    return x, other


def a_buffer_filled_part_by_part(x: Tensor, y: Tensor) -> Outputs:
    joint = torch.empty(2, 12, 8, dtype=x.dtype)
    joint[:, :6] = x
    joint[:, 6:] = y
    return joint


READS = [
    read_before_and_after,
    views_that_overlap,
    views_that_do_not,
    a_view_alone_is_read,
    a_view_of_what_is_written_whole,
    what_the_write_returns,
    one_write_after_the_other,
    a_write_to_each_of_several_views,
    tokens_exchanged,
    what_was_copied_changes_later,
    a_buffer_filled_part_by_part,
]


@pytest.mark.parametrize("write", READS, ids=lambda write: write.__name__)
def test_a_reader_gets_what_the_memory_holds_then(write: Write) -> None:
    assert_equal(Writing(write))


def test_what_is_not_read_again_is_not_put_together() -> None:
    graph = assert_equal(Writing(a_view_alone_is_read))
    assert operators(graph) == [aten.mul.Tensor, aten.add.Tensor]


def test_writes_in_a_submodule_keep_its_path() -> None:
    graph = assert_equal(Outer(slice_of_tokens))
    (scatter,) = graph.find_nodes(op="call_function", target=aten.slice_scatter.default)
    assert scatter.meta["path"] == "inner"
    assert scatter.meta["val"].shape == (2, 6, 8)


def test_a_graph_without_writes_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(node: fx.Node) -> None:
        raise AssertionError(f"{node} writes to nothing")

    monkeypatch.setattr("toca_fx.capture.aten.make_functional", refuse)
    module = Writing(
        lambda x, y: F.dropout(x[:, 1:3].transpose(1, 2), 0.0).detach_() + y[:, 0, :, None]
    )
    graph, _ = traced(module)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        aten.mul.Tensor,
        *[aten.slice.Tensor, aten.transpose.int],
        *[aten.select.int, aten.unsqueeze.default],
        aten.add.Tensor,
    ]


# What is refused


def test_the_refusal_says_what_where_why_and_what_to_do() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        traced(Outer(lambda x, y: y.mul_(2)))
    assert str(caught.value) == (
        "the model writes to a tensor in place (aten.mul_.Tensor, in module inner) and the caller "
        "sees that memory; write it without the trailing underscore, "
        "or exclude the module from compilation"
    )


def to_the_input(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    y[:, 0] = 0
    return x


def to_a_view_of_the_input(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    y.view(12, 8).transpose(0, 1)[1:].mul_(2)
    return x


def to_a_parameter(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    return x * module.weight.mul_(2)


def to_a_buffer(module: Writing, x: Tensor, y: Tensor) -> Outputs:
    module.table[0] = 0
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
    x.data[:, 1:3] = y[:, :2]
    return x


REFUSED: dict[Callable[..., Outputs], str] = {
    to_the_input: r"aten.fill_.Tensor.* the caller sees that memory",
    to_a_view_of_the_input: r"aten.mul_.Tensor.* the caller sees that memory",
    to_a_parameter: r"aten.mul_.Tensor.* the caller sees that memory",
    to_a_buffer: r"aten.fill_.Tensor.* the caller sees that memory",
    random_numbers: r"aten.normal_.default.* it has no counterpart that returns a new tensor",
    to_an_out_argument: r"aten.mul.out.* it has no counterpart that returns a new tensor",
    to_a_diagonal: r"aten.mul_.Tensor.* through aten.diagonal.default, which cannot be followed",
    to_memory_by_its_strides: (
        r"aten.zero_.default.* it goes through aten.as_strided.default, which cannot be followed"
    ),
    to_one_of_two_halves: r"aten.mul_.Tensor.* it is also read as getitem_1",
    to_several_tensors: r"aten._foreach_mul_.Scalar.* what it writes to is no tensor of the graph",
    behind_the_graphs_back: r"aten.copy_.default",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_a_write_that_cannot_be_followed_is_refused(write: Callable[..., Outputs]) -> None:
    module = Writing(lambda x, y: x)
    module.write = lambda x, y: write(module, x, y)
    with pytest.raises(
        UnsupportedModelError, match=rf"^the model writes to a tensor in place \({REFUSED[write]}"
    ):
        traced(module)
