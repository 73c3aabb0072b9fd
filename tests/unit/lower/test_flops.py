"""FLOPs against sums done by hand for small cases, and against torch's counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from toca_fx.lower.flops import FlopCounter, count_flops


def test_linear_counts_two_per_multiply_add() -> None:
    linear = nn.Linear(8, 32)
    graph = make_fx(
        lambda x: nn.functional.linear(x, linear.weight, linear.bias), pre_dispatch=True
    )(torch.randn(2, 5, 8))
    assert sum(count_flops(graph, [torch.randn(2, 5, 8)]).values()) == 2 * 2 * 5 * 8 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_is_counted_on_cpu(dtype: torch.dtype) -> None:
    query = torch.randn(2, 3, 64, 16, dtype=dtype)
    graph = make_fx(nn.functional.scaled_dot_product_attention, pre_dispatch=True)(
        query, query, query
    )
    assert sum(count_flops(graph, [query, query, query]).values()) == 2 * (2 * 2 * 3 * 64 * 64 * 16)


class Blocks(nn.Module):
    """Two equal blocks, views and two streams among them, and another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            query, key, value = layer(x).view(2, 5, 3, 8).unbind(2)
            x = x + (query @ key.transpose(-1, -2)).softmax(-1) @ value
        return self.last(x[:, 1:])


def traced(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return make_fx(model, pre_dispatch=True)(*inputs)


def test_totals_are_those_of_torch() -> None:
    x, counter, theirs = torch.randn(2, 5, 8), FlopCounter(), FlopCounterMode(display=False)
    graph = traced(Blocks(), x)
    with theirs:
        graph(x)
    once = counter.count(graph, [x])
    assert sum(once.values()) == theirs.get_total_flops()
    assert counter.count(graph, [x]) == once
    assert FlopCounter().count(graph, [x]) == once


def test_equal_operators_are_run_once() -> None:
    runs: list[object] = []

    class Seen(FakeTensorMode):
        def dispatch(self, func: object, *args: Any, **kwargs: Any) -> Any:
            runs.append(func)
            return super().dispatch(func, *args, **kwargs)

    mode, counter = Seen(allow_non_fake_inputs=True), FlopCounter()
    x = mode.from_tensor(torch.randn(2, 5, 8))
    graph = traced(Blocks(), torch.randn(2, 5, 8))
    found = counter.count(graph, [x])
    linears = [name for name in found if name.startswith("linear")]
    assert len(linears) == 3
    assert len({found[name] for name in linears}) == 2
    assert runs.count(torch.ops.aten._softmax.default) == 1
    runs.clear()
    assert counter.count(graph, [x]) == found
    assert not runs


def test_values_share_memory_as_the_real_ones_do() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        left, right = x.view(2, 8).chunk(2, dim=1)
        return left, right[1:], F.relu(left), right.reshape(-1), x.transpose(0, 1)

    x = torch.randn(4, 4)
    graph = make_fx(function, pre_dispatch=True)(x)
    values: dict[str, Any] = {}
    FlopCounter().count(graph, [x], values)
    (output,) = graph.graph.find_nodes(op="output")
    results = function(x)
    for result, found in zip(results, values[output.name], strict=True):
        assert (found.shape, found.stride()) == (result.shape, result.stride())
        assert found.storage_offset() == result.storage_offset()
    names = range(len(results))
    shared = [
        (a, b)
        for a in names
        for b in names
        if results[a].untyped_storage().data_ptr() == results[b].untyped_storage().data_ptr()
    ]
    found = values[output.name]
    assert shared == [
        (a, b)
        for a in names
        for b in names
        if found[a].untyped_storage()._cdata == found[b].untyped_storage()._cdata
    ]
