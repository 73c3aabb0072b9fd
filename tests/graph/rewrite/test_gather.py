"""Where the gather stops: operators that mix tokens or have no rule, operands that carry tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import capture, make_policy
from toca_fx.capture.aten import to_aten
from toca_fx.match.matcher import match
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.planner import make_plan
from toca_fx.rewrite.step import rewrite


class Block(nn.Module):
    """x + mlp(between(x)), with something odd between the stream and the MLP."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.position = nn.Parameter(torch.randn(1, 6, 8))

    def between(self, x: Tensor) -> Tensor:
        return {
            "positions of one row": lambda: x + self.position,
            "positions without a batch": lambda: x * self.position[0],
            "positions, gathered behind an operator without a rule": lambda: (
                x + self.position.cumsum(2)
            ),
            "flat positions behind one": lambda: x + self.position[0].cumsum(1),
            "positions viewed without a batch": lambda: x * self.position.view(6, 8),
            "a table that gets a batch": lambda: x * self.position[0].cumsum(1).unsqueeze(0),
            "a table that gets a batch, with a rule": lambda: (
                x * (self.position[0] * 2).unsqueeze(0)
            ),
            "a table with its axes swapped": lambda: (
                x * self.position[0].cumsum(1).t().transpose(0, 1)
            ),
            "a table softmaxed": lambda: x * self.position[0].cumsum(1).softmax(1),
            "a table in chunks": lambda: x * torch.cat(self.position[0].cumsum(1).chunk(2, 1), 1),
            "a table of rank one": lambda: x * self.position[0, :, 0].cumsum(0).unsqueeze(1),
            "positions expanded": lambda: x * self.position.cumsum(2).expand(x.shape[0], -1, -1),
            "a mix of tokens": lambda: x.cumsum(1),
            "an operator without a rule, tokens last": lambda: (
                x.transpose(1, 2).cumsum(1).transpose(1, 2)
            ),
            "without a rule, tokens last, one row": lambda: (
                x + self.position.transpose(1, 2).cumsum(1).transpose(1, 2)
            ),
            "heads": lambda: (
                (x.unflatten(2, (2, 4)).transpose(1, 2) * 2).transpose(1, 2).flatten(2)
            ),
            "heads behind an operator without a rule": lambda: (
                x.unflatten(2, (2, 4)).transpose(1, 2).cumsum(3).transpose(1, 2).flatten(2)
            ),
            "tokens and batch in one axis": lambda: torch.tanh(x.reshape(-1, 8)).reshape(x.shape),
            "a norm of both axes": lambda: nn.functional.layer_norm(x, [6, 8]),
        }[self.name]()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Model(nn.Module):
    """One such block."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(name)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


@pytest.mark.parametrize(
    "name",
    [
        "positions of one row",
        "positions without a batch",
        "positions, gathered behind an operator without a rule",
        "flat positions behind one",
        "positions viewed without a batch",
        "a table that gets a batch",
        "a table that gets a batch, with a rule",
        "a table with its axes swapped",
        "a table softmaxed",
        "a table in chunks",
        "a table of rank one",
        "positions expanded",
        "a mix of tokens",
        "an operator without a rule, tokens last",
        "without a rule, tokens last, one row",
        "heads",
        "heads behind an operator without a rule",
        "tokens and batch in one axis",
        "a norm of both axes",
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fresh_token_is_what_the_model_computes_wherever_the_gather_is(
    name: str, batch: int
) -> None:
    torch.manual_seed(0)
    model = Model(name).double().eval().requires_grad_(False)
    x = torch.randn(batch, 6, 8, dtype=torch.float64)
    captured, inputs = capture(model, x)
    source = to_aten(captured, inputs)
    plan = make_plan(match(source.graph), make_policy(scores={"staleness": 1.0}))
    graph = rewrite(source, plan.step(plan.steps[1].modes))
    assert {*graph.buffers} == {Buffer("cache", 0), Buffer("order", 0), Buffer("ranks", 0)}
    cache = torch.randn(batch, 6, 8, dtype=torch.float64)
    tokens = torch.tensor([[5, 0, 3], [1, 2, 4], [4, 3, 2]])[:batch]
    expected = cache.clone()
    for sample in range(batch):
        for token in tokens[sample].tolist():
            expected[sample, token] = (model(x) - x)[sample, token]
    rows = tokens + 6 * torch.arange(batch)[:, None]
    tensors = {
        Buffer("cache", 0): cache,
        Buffer("order", 0): rows,
        Buffer("ranks", 0): torch.arange(rows.shape[1]),
    }
    (output,) = graph.module(
        *(inputs[i] for i in graph.kept), *(tensors[buffer] for buffer in graph.buffers)
    )
    assert (output - x - expected).abs().max() < 1e-12
    assert (cache - expected).abs().max() < 1e-12
