"""The rules that were tried beside the policies' own, on a few tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.frontier import tried

FULL = (0, 2, 5, 7)


def drawn(count: int, shape: tuple[int, ...] = (2, 1, 8, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def values(of: list[Tensor], last: int = 4) -> list[tuple[int, Tensor]]:
    return list(zip(FULL[:last], of, strict=False))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_newton_is_the_polynomial_through_the_last_values(order: int) -> None:
    (slope,) = drawn(1)
    known = values([slope * at**order + 1 for at in FULL])
    assert torch.allclose(tried.newton(known, 9, order), slope * 9**order + 1, atol=1e-3)


def test_guidance_of_equal_orders_is_a_forecast_of_both_halves() -> None:
    known = values(drawn(4))
    for conditional in (0, 1):
        found = tried.guided(known, 9, conditional, 1, 1, 1.0)
        assert torch.allclose(found, tried.newton(known, 9, 1), atol=1e-5)
    kept = tried.guided(known, 9, 0, 1, 1, 0.0)
    difference = kept[0] - kept[1]
    assert torch.allclose(difference, known[-1][1][0] - known[-1][1][1], atol=1e-5)


def test_frequencies_of_equal_orders_are_all_of_them() -> None:
    known = values(drawn(4))
    found = tried.frequencies(known, 9, 1, 1, 0.5)
    assert torch.allclose(found, tried.newton(known, 9, 1), atol=1e-4)
    mean = tried.frequencies(known, 9, 0, 1, 0.01).mean(dim=(2, 3))
    assert torch.allclose(mean, known[-1][1].mean(dim=(2, 3)), atol=1e-5)


def test_ridge_finds_the_weights_that_made_a_run() -> None:
    made = drawn(10)
    made[9] = 3 * made[7] - 0.5 * made[5]
    rule = tried.fitted(made, FULL, 2, 1e-9)
    assert torch.allclose(rule(values([made[at] for at in FULL]), 9), made[9], atol=1e-4)
    held = tried.fitted(made, FULL, 2, 1e9)
    line = tried.newton(values([made[at] for at in FULL]), 9, 1)
    assert torch.allclose(held(values([made[at] for at in FULL]), 9), line, atol=1e-3)


def test_skipped_steps_do_not_run_the_model() -> None:
    calls: list[float] = []

    def model(x: Tensor, timestep: float) -> tuple[Tensor, ...]:
        calls.append(timestep)
        return (x * timestep,)

    x = torch.ones(2, 3)
    denoiser = tried.Skipping(model, (0, 1, 4), lambda known, at: tried.newton(known, at, 1))
    found = [float(denoiser(x, timestep=float(at))[0][0, 0]) for at in range(6)]
    assert calls == [0.0, 1.0, 4.0]
    assert found == pytest.approx([0, 1, 2, 3, 4, 5])
