"""What must hold exactly of forecasts and skips: order 0 is reuse, N = 1 is the model, polynomials
are met.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.captured import Captured
from tests.helpers import make_inputs, run_all
from tests.marks import slow_but
from tests.reference_forecast import History, Moment
from tests.system.runtime.grains import GRAINS, TOLERANCE, captured, of_grain, run, same

BASES = ["newton", "taylor", "hermite", "chebyshev"]


@pytest.mark.parametrize(
    ("grain", "basis"),
    slow_but(
        [*((grain, "newton") for grain in GRAINS), *(("module", basis) for basis in BASES)],
        [(grain, basis) for grain in GRAINS for basis in BASES],
        "each grain and each basis once",
    ),
)
def test_order_0_is_reuse(grain: str, basis: str) -> None:
    _, twin = captured(torch.float32)
    constant, reuse = (
        run(twin.compile(of_grain(grain, forecast=each)), twin.inputs)
        for each in ({"basis": basis, "order": 0}, {"basis": "reuse"})
    )
    assert same(constant, reuse)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(
    "dtype", slow_but([torch.float32], [torch.float32, torch.float64], "one dtype is enough")
)
def test_an_interval_of_one_is_the_model(grain: str, dtype: torch.dtype) -> None:
    model, twin = captured(dtype)
    policy = of_grain(grain, N={"base": 1})
    expected = run_all(model, make_inputs(12, dtype=dtype))
    assert same(run(twin.compile(policy), twin.inputs), expected)
    assert not twin.plan(policy).kept


class Affine(nn.Module):
    """What its MLPs put out, and so everything, is affine in latents [B, N, 4] and in timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)]
        )
        for block in self.blocks:
            nn.init.constant_(block[0].bias, 100.0)  # far from the bend

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.embed(x) + t[:, None, None] / 1000
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(tokens)


@cache
def affine(degree: int, axis: str) -> Captured:
    """Latents are polynomials of the step, or of the timestep, which is no line."""
    torch.manual_seed(degree)
    model, images = Affine().double().requires_grad_(False), torch.randn(degree + 1, 2, 6, 4)
    calls = []
    for step in range(12):
        timestep = 900.0 - 70 * step - (0.5 * step**2 if axis == "timestep" else 0)
        at = timestep / 1000 if axis == "timestep" else step / 12
        x = sum(at**power * image for power, image in enumerate(images.double()))
        calls.append({"x": x, "t": torch.full((2,), timestep, dtype=torch.float64)})
    return Captured(model, calls)


POLYNOMIALS: dict[str, tuple[int, dict[str, Any]]] = {
    "newton 1": (1, {"basis": "newton"}),
    "newton 2": (2, {"basis": "newton", "order": 2}),
    "newton 3": (3, {"basis": "newton", "order": 3}),
    "newton 2, in timesteps": (2, {"basis": "newton", "order": 2, "time": "timestep"}),
    "newton 1, blended": (1, {"basis": "newton", "order": 1, "blend": 0.5}),
    "taylor": (1, {"basis": "taylor"}),
    "hermite of the scale of a line": (1, {"basis": "hermite", "sigma": 0.5**0.5}),
    "chebyshev 2": (2, {"basis": "chebyshev", "order": 2, "ridge": 0}),
    "chebyshev 3, in timesteps": (
        3,
        {"basis": "chebyshev", "order": 3, "ridge": 0, "time": "timestep"},
    ),
    "a table": (1, {"basis": "table", "weights": [[1.5, -0.5]]}),
}


@pytest.mark.parametrize(
    "grain",
    slow_but(["module", "model"], ["module", "block", "model", "output"], "two grains are enough"),
)
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials_are_met(name: str, grain: str) -> None:
    """Once enough full steps have run, and not before."""
    degree, forecast = POLYNOMIALS[name]
    # Unevenly spaced, but for the table.
    full = [0, 2, 4, 6, 8, 10] if name == "a table" else [0, 2, 3, 6, 8]
    twin = affine(degree, forecast.get("time", "step"))
    policy = of_grain(grain, forecast=forecast, N={"full_steps": full})
    expected = run(twin.compile(of_grain(grain, N={"base": 1})), twin.inputs)
    for step, (output, wanted) in enumerate(
        zip(run(twin.compile(policy), twin.inputs), expected, strict=True)
    ):
        error = (output - wanted).abs().max().item()
        kept = sum(call <= step for call in full)
        if step in full or kept > degree:
            assert error <= TOLERANCE * wanted.abs().max(), step
        else:
            assert error > 1e-3, step


def test_blocks_are_forecast_by_what_they_added() -> None:
    """Against hooks on the blocks of the model itself."""
    model, twin = captured()
    policy = of_grain("block", N={"base": 4, "first": 2})
    assert len(twin.plan(policy).runs) == 2
    outputs = run(twin.compile(policy), twin.inputs)
    plan, memories = twin.plan(policy), dict[nn.Module, History]()
    now = Moment(0, 0.0)

    def hook(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        memory = memories.setdefault(block, History.of(policy, 12))
        if plan.steps[now.call].kind == "full":
            memory.add(now, output - args[0])
        return args[0] + memory.at(now)

    handles = [block.register_forward_hook(hook) for block in model.blocks]
    for call, (inputs, output) in enumerate(
        zip(make_inputs(dtype=torch.float64), outputs, strict=True)
    ):
        now = Moment(call, 0.0)
        (wanted,) = run_all(model, [inputs])
        assert (output - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), call
    for handle in handles:
        handle.remove()
