"""The adds of the residual stream, what lies between two nodes, and where everything passes."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from tests.helpers import capture
from toca_fx.capture.aten import to_aten
from toca_fx.graph.stream import Flow, passages, root

aten = torch.ops.aten


class Parallel(nn.Module):
    """Two branches of one state, added one after the other, then something that is no branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.one(x).relu(), self.two(x)
        x = x + first
        x = x + second.view(x.shape)
        return x + x.abs()


def graph_of(model: nn.Module) -> fx.Graph:
    captured, inputs = capture(model.eval().requires_grad_(False), torch.randn(2, 3, 4))
    return to_aten(captured, inputs).graph


def test_residual_adds_and_the_states_that_branches_read() -> None:
    graph = graph_of(Parallel())
    flow = Flow(graph)
    first, second, third = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert list(flow.residuals) == [first, second], "the last add has no linear layer in its branch"
    stream, branch = flow.residuals[second]
    assert stream is first
    assert flow.read_by(branch, stream) is flow.residuals[first][0], (
        "the second branch reads the state before the first add"
    )
    assert flow.reaches(first, third)
    assert not flow.reaches(third, first)
    assert root(branch).target is aten.linear.default


def test_passages_leave_out_what_runs_beside() -> None:
    graph = graph_of(Parallel())
    flow = Flow(graph)
    first, *_, last = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    region = flow.between(first, last)
    way = [node.target for node in passages(region)]
    assert aten.abs.default in {node.target for node in region}
    assert way == [aten.add.Tensor] * 3
