"""Writes in place become values: the graph computes what the module does, writes to nothing, and
refuses what it cannot follow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.graph.capture.writes import (
    SINCE_2_15,
    WRITES,
    Outer,
    Outputs,
    Write,
    Writing,
    empty_slice,
    inputs,
    slice_of_tokens,
    traced,
)
from toca_fx.torch_private import is_mutable

aten = torch.ops.aten


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
    assert not any(is_mutable(node.target) for node in graph.graph.nodes)
    return graph.graph


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_becomes_a_value(write: Write) -> None:
    graph = assert_equal(Writing(write))
    renamed = [SINCE_2_15.get(target, target) for target in WRITES[write]]
    assert operators(graph) in (WRITES[write], renamed)
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
        lambda x, y: F.dropout(x.detach_()[:, 1:3].transpose(1, 2), 0.0) + y[:, 0, :, None]
    )
    graph, _ = traced(module)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        aten.mul.Tensor,
        *[aten.slice.Tensor, aten.transpose.int],
        *[aten.select.int, aten.unsqueeze.default],
        aten.add.Tensor,
    ]
