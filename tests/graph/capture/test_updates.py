"""What a model writes to its buffers is written after a call, whatever of the graph has run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import capture, make_policy
from tests.models import Attention, Mlp, randomize
from toca_fx.capture.aten import to_aten, verify
from toca_fx.diagnostics import UnsupportedModelError

TOKENS, WIDTH = 8, 16

Table = Callable[["Model", int], Tensor]


class Model(nn.Module):
    """A table of angles, made by ``table`` when it is first asked for, and added to the tokens."""

    table: Tensor
    calls: Tensor

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.attn, self.mlp = nn.ModuleList([Attention(WIDTH, 2)]), nn.ModuleList([Mlp(WIDTH, 32)])
        self.register_buffer("table", torch.zeros(2 * TOKENS, WIDTH, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("later", None, persistent=False)
        self.rates = torch.linspace(0.1, 1, WIDTH, dtype=torch.float64)  # no buffer
        self.known: dict[int, Tensor] = {}
        self.length, self.make = 0, table

    def angles(self, tokens: int) -> Tensor:
        return torch.outer(torch.arange(tokens, dtype=torch.float64), self.rates)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            x = x + attn(x + self.make(self, x.shape[1]))
            x = x + mlp(x + self.make(self, x.shape[1])) * t[:, None, None]
        return x


def first_rows(model: Model, tokens: int) -> Tensor:
    """As rotary-embedding-torch has it, which knows by a number of how many."""
    if model.length < tokens:
        model.table[:tokens] = model.angles(tokens).detach()
        model.length = tokens
    return model.table[:tokens].detach()


def all_of_it(model: Model, tokens: int) -> Tensor:
    if model.length < tokens:
        model.table.zero_()
        model.table[:tokens].copy_(model.angles(tokens))
        model.length = tokens
    return model.table[:tokens]


def by_a_matrix_product(model: Model, tokens: int) -> Tensor:
    if model.length < tokens:
        places = torch.arange(tokens, dtype=torch.float64)[:, None]
        model.table[:tokens] = places @ model.rates[None]
        model.length = tokens
    return model.table[:tokens]


def in_a_region(model: Model, tokens: int) -> Tensor:
    """Rounded as autocast has it, of the model's own."""
    with torch.autocast("cpu", torch.bfloat16):
        if model.length < tokens:
            places = torch.arange(tokens, dtype=torch.float32)[:, None]
            model.table[:tokens] = places @ model.rates[None].float()
            model.length = tokens
    return model.table[:tokens]


def a_new_buffer(model: Model, tokens: int) -> Tensor:
    """As its earlier releases."""
    if model.later is None:
        model.register_buffer("later", model.angles(tokens), persistent=False)
    return model.later


def an_attribute(model: Model, tokens: int) -> Tensor:
    if model.length < tokens:
        model.later, model.length = model.angles(tokens), tokens
    return model.later


def a_dictionary(model: Model, tokens: int) -> Tensor:
    if tokens not in model.known:
        model.known[tokens] = model.angles(tokens)
    return model.known[tokens]


def a_counter(model: Model, tokens: int) -> Tensor:
    """At every call, twice."""
    model.calls += 1
    return model.angles(tokens) * model.calls


def a_running_mean(model: Model, tokens: int) -> Tensor:
    model.table[0].mul_(0.9)
    model.table[0].add_(model.angles(tokens)[1], alpha=0.1)
    return model.table[:tokens]


TABLES = [
    first_rows,
    all_of_it,
    by_a_matrix_product,
    in_a_region,
    a_new_buffer,
    an_attribute,
    a_dictionary,
    a_counter,
    a_running_mean,
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_buffers_are_written_as_by_the_model(table: Table) -> None:
    """Full at every step, so that the model itself tells the results."""
    model = randomize(Model(table), seed=0).double()
    twin = copy.deepcopy(model)
    fast = toca_fx.compile(model, make_policy(N={"base": 1}), inner="eager")
    with torch.no_grad(), toca_fx.session(num_steps=4):
        for call in range(4):
            x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
            t = torch.full((2,), 0.9 - 0.1 * call, dtype=torch.float64)
            torch.testing.assert_close(fast(x, t), twin(x, t), rtol=0, atol=1e-12)
            for (name, ours), theirs in zip(fast.named_buffers(), twin.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=name)


def test_a_table_costs_one_step() -> None:
    model = randomize(Model(first_rows), seed=0).double()
    fast = toca_fx.compile(model, make_policy(), inner="eager")
    kinds = []
    with torch.no_grad():
        for _ in range(2):
            with toca_fx.session(num_steps=12) as run:
                for call in range(12):
                    t = torch.full((2,), 0.9 - 0.05 * call, dtype=torch.float64)
                    fast(torch.randn(2, TOKENS, WIDTH, dtype=torch.float64), t)
            kinds.append([step.kind for step in run.report().steps])
    assert kinds[1] == ["full", "partial", "partial"] * 4
    assert kinds[0].count("full") <= kinds[1].count("full") + 1


def test_capturing_and_verifying_write_nothing() -> None:
    model = randomize(Model(a_counter), seed=0).double()
    given = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    captured, inputs = capture(model, *given)
    graph = to_aten(captured, inputs)
    verify(captured, graph, inputs)
    assert not model.calls
    graph.meta["updates"].apply(inputs)
    assert model.calls == 2


def test_what_takes_the_model_to_compute_is_refused() -> None:
    def running(model: Model, tokens: int) -> Tensor:
        model.table[:tokens] = model.attn[0](model.angles(tokens)[None])[0]
        return model.table[:tokens]

    class Streaming(Model):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x = x + self.attn[0](x) * t[:, None, None]
            self.table[:TOKENS] = x[0]
            return x

    model = randomize(Streaming(running), seed=0).double()
    given = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match=r"writes to its buffers .* what aten\."):
        to_aten(*capture(model, *given))
