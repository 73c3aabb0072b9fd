"""FLOPs of a graph, node by node, by the formulas of ``torch.utils.flop_counter``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from toca_fx.graph.ops import overloads_of
from toca_fx.kernels.columns import attention_and_columns
from toca_fx.torch_private import detect_fake_mode, sdpa_flop_count

(_SCORED,) = overloads_of(attention_and_columns)


def _attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *_args: Any, **_kwargs: Any
) -> int:
    """FLOPs of the CPU's fused attention, which the registry of torch 2.13 lacks."""
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


def _columns(query: torch.Size, key: torch.Size, every: int) -> int:
    """FLOPs of s1 on a GPU: a product of the keys with every ``every``-th query."""
    batch, heads, rows, width = query
    return 2 * batch * heads * -(rows // -every) * key[2] * width


def _attention_and_columns(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    _scale: float,
    every: int = 1,
    *_args: Any,
    **_kwargs: Any,
) -> int:
    return _attention(query, key, value) + _columns(query, key, every)


def _packed(rows: torch.Size, weight: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """FLOPs of a linear layer on packed int8 weights [out, in]."""
    return 2 * rows[0] * rows[1] * weight[0]


_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._weight_int8pack_mm: _packed,
    _SCORED.overloadpacket: _attention_and_columns,
}


class Autocast:
    """Torch's autocast state when this was made; graphs keep no casts, and need it again."""

    def __init__(self) -> None:
        self._states = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in ("cpu", "cuda")
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run everything inside in that state."""
        with ExitStack() as stack:
            for device, dtype, enabled in self._states:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


def count_flops(
    module: fx.GraphModule, inputs: Sequence[Any], values: dict[str, Any] | None = None
) -> dict[str, int]:
    """FLOPs of ``module`` run on ``inputs``, by node; 2 FLOPs per multiply-add.

    ``inputs`` may be fake. Nodes without FLOPs are left out. ``values`` takes what the nodes
    compute, by name.
    """
    counter = _Counter(module, values)
    # Tables that the graph makes by itself are fake too, then.
    with torch.no_grad(), detect_fake_mode(inputs) or nullcontext(), counter.mode:
        counter.run(*inputs)
    return counter.flops


def columns_flops(node: fx.Node) -> int:
    """FLOPs at ``node`` for scores that are computed only if they are used (see ``columns``)."""
    if node.target is not _SCORED:
        return 0
    query, key, _value, _scale, *more = cast("tuple[Any, ...]", node.args)
    return _columns(query.meta["val"].shape, key.meta["val"].shape, more[0] if more else 1)


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, values: dict[str, Any] | None) -> None:
        super().__init__(module)
        self._values = values
        self.mode = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        self.flops: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.mode.get_total_flops()
        result = super().run_node(n)
        if spent := self.mode.get_total_flops() - before:
            self.flops[n.name] = spent
        if self._values is not None:
            self._values[n.name] = result
        return result
