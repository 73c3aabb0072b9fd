"""FLOPs of a graph by the formulas of ``torch.utils.flop_counter``, node by node, on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from toca_fx import columns


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """The CPU's fused kernel is missing from the registry of torch 2.13; it does the same work as the others."""
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


def _columns(query: torch.Size, key: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """s1 on a GPU: one product of queries and keys."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * width


def _packed(rows: torch.Size, weight: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """A linear layer on packed int8 weights [out, in]."""
    return 2 * rows[0] * rows[1] * weight[0]


_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._weight_int8pack_mm: _packed,
    columns.column_sums._opoverload.overloadpacket: _columns,
}


class Autocast:
    """Torch's autocast state at some time, to be entered again: graphs keep no casts of it."""

    def __init__(self) -> None:
        self._states = [(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Everything inside runs in that state."""
        with ExitStack() as stack:
            for device, dtype, enabled in self._states:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


def count_flops(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """FLOPs per node (those with any) of ``module`` run on ``inputs``, which may be fake; 2 FLOPs per multiply-add."""
    counter = _Counter(module)
    with torch.no_grad(), counter.mode:
        counter.run(*inputs)
    return counter.flops


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.mode = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        self.flops: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.mode.get_total_flops()
        result = super().run_node(n)
        if spent := self.mode.get_total_flops() - before:
            self.flops[n.name] = spent
        return result
