"""The predicted peak of small graphs by hand: which values are there at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from toca_fx.lower.memory import allocated, step_peak

MIB = 2**20


def test_the_allocator() -> None:
    """CUDACachingAllocator: blocks of 512 bytes; large ones are not split if 1 MiB or less would be
    left.
    """
    assert [allocated(nbytes) for nbytes in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert [allocated(nbytes * MIB) for nbytes in (3, 9, 10, 11, 12, 27, 28)] == [
        nbytes * MIB for nbytes in (3, 9, 10, 12, 12, 28, 28)
    ]
    assert allocated(26 * MIB + 512) == 26 * MIB + 512


# A graph of one piece: which values are there at once


def peak_of(function: Callable[..., Any], *inputs: Tensor) -> int:
    """The peak of a function of tensors, in float32 tensors of [64, 128]; what is much smaller does
    not count.
    """
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    values = {node.name: node.meta["val"] for node in module.graph.nodes if node.op != "output"}
    return step_peak(module.graph, values, {}) // (64 * 128 * 4)


linear = torch.nn.functional.linear

X, W = torch.zeros(64, 128), torch.zeros(128, 128)


def test_an_mlp_holds_its_hidden_state_once() -> None:
    up, down = torch.zeros(512, 128), torch.zeros(128, 512)
    assert (
        peak_of(
            lambda x, up, down: linear(torch.nn.functional.gelu(linear(x, up)), down), X, up, down
        )
        == 4 + 1
    )
    assert peak_of(lambda x, up, down: linear(linear(x, up), down), X, up, down) == 4 + 1


def test_what_a_product_reads_is_written() -> None:
    assert peak_of(lambda x: (x + 1) * 2 + (x + 1).mean(), X) == 1
    assert peak_of(linear, X, W) == 1
    assert peak_of(lambda x, w: linear(x + 1, w), X, W) == 2


def test_what_reads_a_lot_is_not_computed_again() -> None:
    def of_products(*tensors: Tensor) -> Tensor:
        *xs, w = tensors
        products = [linear(x, w) for x in xs]
        added = sum(products[1:], products[0])
        return linear(added * 2, w) + linear(added * 3, w)

    # The sum of four products is computed for each of its two readers, and so all four stay; that
    # of six is written, in place of one.
    assert peak_of(of_products, *[X] * 4, W) == 4 + 1
    assert peak_of(of_products, *[X] * 6, W) == 6


def test_kernels_are_in_the_order_that_takes_least() -> None:
    def late(x: Tensor, w: Tensor) -> Tensor:
        products = [linear(x, w), linear(x, w), linear(x, w), linear(x, w)]
        return torch.stack([product.sum() for product in products])

    assert peak_of(late, X, W) == 1


def test_a_cache_is_written_in_place() -> None:
    def step(cache: Tensor, rows: Tensor, x: Tensor, w: Tensor) -> Tensor:
        merged = torch.ops.aten.index_put(cache, [rows], linear(x, w))
        cache.copy_(merged)
        return merged.sum()

    assert peak_of(step, torch.zeros(1024, 128), torch.zeros(64, dtype=torch.int64), X, W) == 1
