"""FLOPs of a graph by the formulas of ``torch.utils.flop_counter``, node by node, on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode


def count_flops(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """FLOPs per node (those with any) of ``module`` run on ``inputs``, which may be fake; 2 FLOPs per multiply-add."""
    counter = _Counter(module)
    with torch.no_grad(), counter.mode:
        counter.run(*inputs)
    return counter.flops


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.mode = FlopCounterMode(display=False)
        self.flops: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.mode.get_total_flops()
        result = super().run_node(n)
        if spent := self.mode.get_total_flops() - before:
            self.flops[n.name] = spent
        return result
