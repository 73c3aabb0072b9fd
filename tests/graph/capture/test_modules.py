"""Nodes tell which module they come from, and which call of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.helpers import capture
from toca_fx.capture.aten import to_aten

aten = torch.ops.aten


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x))


class Outer(nn.Module):
    """One module twice, one once, and both twice in all."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = Inner(), Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(self.twice(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer, self.list = Outer(), nn.ModuleList([Inner()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.list[0](self.outer(x))
        return x


def test_calls_are_counted_within_the_call_around_them() -> None:
    captured, inputs = capture(Model(), torch.randn(2, 4))
    graph = to_aten(captured, inputs).graph
    linears = graph.find_nodes(op="call_function", target=aten.linear.default)
    calls = [
        name
        for n in range(2)
        for name in (f"outer@{n}.twice@0", f"outer@{n}.twice@1", f"outer@{n}.once", f"list.0@{n}")
    ]
    # A linear has no modules inside: which call of it this is does not matter.
    assert [node.meta["path"] for node in linears] == [
        f"{call}.linear" for call in calls for _ in range(2)
    ]
    assert linears[0].meta["stack"] == ("outer@0", "outer@0.twice@0", "outer@0.twice@0.linear")
    assert linears[0].meta["classes"] == ("Outer", "Inner", "Linear")
