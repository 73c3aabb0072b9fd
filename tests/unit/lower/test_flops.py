"""FLOPs against sums done by hand for one small case."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from toca_fx.lower.flops import count_flops


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
