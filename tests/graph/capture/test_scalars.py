"""Python numbers that vary: inputs of one graph where they scale or shift, else one graph each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import make_policy
from toca_fx.backend import Backend, Dispatcher

Use = Callable[[Tensor, Any], Tensor]


class Model(nn.Module):
    """An MLP on latents [1, 4, 8], behind what ``use`` makes of them and of a number."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.scales = use, {"a": 1.0}
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))])

    def forward(self, hidden_states: Tensor, timestep: Tensor, scale: float = 1.5) -> Any:
        x = hidden_states + timestep[:, None, None].to(hidden_states.dtype)
        x = self.use(x, self.scales["a"]) * scale
        return x + self.blocks[0](x)


# The numbers that change are inputs of the graph, ...
INPUTS: dict[str, Use] = {
    "times": lambda x, s: x * s,
    "times it": lambda x, s: s * x,
    "a method": lambda x, s: x.mul(s).add(s).sub(s).div(s),
    "functions": lambda x, s: torch.add(torch.mul(x, s), s) - s,
    "over": lambda x, s: x / s - s / x.abs().clamp(min=1),
    "shifted": lambda x, s: (s - x) + s,
    "arithmetic": lambda x, s: x * (s * 0.3 / (s + 1) - 0.1),
    "twice": lambda x, s: x * s + (x + 1) * s,
    "whole numbers": lambda x, s: x + (torch.arange(8) * s),
    "one number": lambda x, s: x + torch.ones(()) * s,
}
# ... or the graph is for one of them.
FIXED: dict[str, Use] = {
    "an argument": lambda x, s: nn.functional.softplus(x, beta=s),
    "alpha": lambda x, s: torch.add(x, x.cos(), alpha=s),
    "a bound": lambda x, s: x.clamp(max=s),
    "both": lambda x, s: x.clamp(max=s) * s,
    "in place": lambda x, s: x.clone().mul_(s),
    "added to a narrow tensor": lambda x, s: (x.bfloat16() + s).float(),
    "a tensor of it": lambda x, s: x + torch.full((8,), s),
}
VALUES = (0.5, 0.7, -1.25, 0.3)


class Count:
    """How many graphs were captured, and how many were analysed."""

    captured = prepared = 0


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    made, called, prepared = Count(), Backend.__call__, Dispatcher._prepare

    def call(self: Backend, *args: Any) -> Any:
        made.captured += 1
        return called(self, *args)

    def prepare(self: Dispatcher, *args: Any) -> Any:
        made.prepared += 1
        return prepared(self, *args)

    monkeypatch.setattr(Backend, "__call__", call)
    monkeypatch.setattr(Dispatcher, "_prepare", prepare)
    return made


def changing(
    use: Use, count: Count, dtype: torch.dtype = torch.float32, scales: Any = (1.5, 1.5, 1.5, 1.5)
) -> None:
    """Calls with ``VALUES``; all are the model's own, bit for bit."""
    model = Model(use).to(dtype).eval().requires_grad_(False)
    fast = toca_fx.compile(model, make_policy(N={"base": 1}), inner="eager")
    x, t = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype), torch.ones(1)
    for value, scale in zip(VALUES, scales, strict=True):
        model.scales["a"] = value
        with torch.no_grad():
            assert torch.equal(fast(x, t, scale=scale), model(x, t, scale=scale)), value
        t = t - 0.1


@pytest.mark.parametrize("name", INPUTS)
def test_a_number_that_scales_is_an_input(name: str, count: Count) -> None:
    changing(INPUTS[name], count)
    assert (count.captured, count.prepared) == (2, 2)


@pytest.mark.parametrize("name", FIXED)
def test_any_other_number_has_a_graph_of_its_own(name: str, count: Count) -> None:
    changing(FIXED[name], count)
    assert (count.captured, count.prepared) == (2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["times", "over"])
def test_it_is_rounded_as_torch_does(name: str, dtype: torch.dtype, count: Count) -> None:
    changing(INPUTS[name], count, dtype)
    assert count.prepared == 2


def test_it_may_be_an_argument_and_a_whole_number(count: Count) -> None:
    changing(INPUTS["times"], count, scales=(0.5, 0.7, 0.9, 0.4))
    assert count.prepared == 2
    torch._dynamo.reset()
    changing(INPUTS["times"], count, scales=(2, 3, 5, 7))
    assert count.prepared == 4


def test_numbers_that_are_equal_at_first_may_differ_later(count: Count) -> None:
    """In a graph that is traced whole, as something in it is written in place."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.5

        def forward(self, x: Tensor) -> Tensor:
            written = x.clone()
            written[0].mul_(2)
            return written.sin() / self.scale

    model = nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 4), Scaled()).eval()
    fast = toca_fx.compile(model, make_policy(N={"base": 1}), inner="eager", dynamic=True)
    x = torch.randn(2, 3, 4)
    for scales in ((1.5, 1.5), (1.5, 2.5), (3.0, 2.0)):
        model[1].scale, model[3].scale = scales
        with torch.no_grad():
            assert torch.equal(fast(x), model(x)), scales
    assert (count.captured, count.prepared) == (1, 1)
