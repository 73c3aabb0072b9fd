"""Recorded generations, and what replays of them find: without any model."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from toca_fx.policy import Forecast
from toca_fx.quality.course import Errors
from toca_fx.quality.forecasting import Forecasting
from toca_fx.quality.record import course, record
from toca_fx.quality.stand_in import Answer, Sample, only_tensor

STEPS, SHAPE, GUIDANCE = 12, (3, 2, 4, 4), 2.5


class Output(NamedTuple):
    sample: Tensor


def noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def model(latents: Tensor, time: Tensor, condition: float = 1.0) -> Output:
    """What turns with the time and with the latents, and differs by condition and by row."""
    rows = torch.arange(1, len(latents) + 1)[:, None, None, None] / len(latents)
    return Output(torch.sin(3 * time * rows + condition * latents.flip(-1)) + condition * rows)


def euler(answer: Answer, both: Callable[[Answer, Tensor, Tensor], Tensor]) -> Tensor:
    x = noise()
    for step in range(STEPS):
        x = x - both(answer, x, torch.tensor(1 - step / STEPS)) / STEPS
    return x


def batched(answer: Answer, x: Tensor, time: Tensor) -> Tensor:
    unconditional, conditional = answer(torch.cat([x, x]), time).sample.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def separate(answer: Answer, x: Tensor, time: Tensor) -> Tensor:
    conditional, unconditional = answer(x, time, 1.0).sample, answer(x, time, 0.5).sample
    return unconditional + GUIDANCE * (conditional - unconditional)


def alone(answer: Answer, x: Tensor, time: Tensor) -> Tensor:
    return answer(x, time).sample


def with_variance(answer: Answer, x: Tensor, time: Tensor) -> Tensor:
    return answer(x.repeat(1, 2, 1, 1), time).sample[:, : SHAPE[1]]


WAYS = {
    "alone": (alone, 1, 1, [1.0]),
    "batched": (batched, 1, 2, [1 - GUIDANCE, GUIDANCE]),
    "separate": (separate, 2, 1, [GUIDANCE, 1 - GUIDANCE]),
    "with_variance": (with_variance, 1, 1, [1.0]),
}


@pytest.mark.parametrize("way", WAYS)
def test_gains_are_those_of_the_loop(way: str) -> None:
    both, branches, halves, expected = WAYS[way]

    def sample(answer: Answer) -> Tensor:
        return euler(answer, both)

    recorded = record("runs[0]", sample, model)
    assert (recorded.steps, recorded.branches, recorded.halves) == (STEPS, branches, halves)
    gains = course("runs[0]", sample, recorded).gains
    assert gains.shape == (STEPS, len(expected))
    sign = torch.sign(gains[0, 0] * expected[0])  # that of all of them together does not matter
    wanted = torch.tensor([expected] * STEPS).double() / STEPS
    torch.testing.assert_close(sign * gains, wanted, rtol=1e-4, atol=1e-5)


def test_gains_are_the_coefficients_of_ddim() -> None:
    alphas = [math.cos(math.pi / 2 * (1 - place / STEPS)) ** 2 for place in range(STEPS + 1)]
    scales, shares = [], []
    for now, then in pairwise(alphas):
        scales.append(math.sqrt(then * now) + math.sqrt((1 - then) * (1 - now)))
        shares.append(math.sqrt((1 - then) * now) - math.sqrt(then * (1 - now)))

    def sample(answer: Answer) -> Tensor:
        x = noise()
        for step in range(STEPS):
            x = scales[step] * x + shares[step] * answer(x, torch.tensor(float(step))).sample
        return x

    gains = course("runs[0]", sample, record("runs[0]", sample, model)).gains[:, 0]
    wanted = [shares[step] * math.prod(scales[step + 1 :]) for step in range(STEPS)]
    torch.testing.assert_close(
        gains.abs(), torch.tensor(wanted).double().abs(), rtol=1e-4, atol=1e-6
    )
    assert len(gains.sign().unique()) == 1


@pytest.mark.parametrize("way", WAYS)
def test_errors_are_those_of_the_final_result(way: str) -> None:
    """Where a model does not answer to its latents, forecasts do exactly what is predicted."""
    both = WAYS[way][0]

    def deaf(latents: Tensor, time: Tensor, condition: float = 1.0) -> Output:
        return model(torch.ones_like(latents), time, condition)

    def sample(answer: Answer) -> Tensor:
        return euler(answer, both)

    recorded = record("runs[0]", sample, deaf)
    found = course("runs[0]", sample, recorded)
    for order, full in ((0, (0, 4, 8)), (1, (0, 1, 5, 9)), (2, (0, 2, 4, 7, 10))):
        forecast = Forecast(basis="newton", order=order)
        moved = sample(Forecasting(deaf, forecast, full, recorded.branches)) - recorded.final
        predicted = Errors(found, forecast).total(full) ** 0.5
        assert predicted == pytest.approx(float(moved.norm()), rel=1e-3)


@pytest.mark.parametrize(
    "form",
    [
        Output,
        lambda value: value,
        lambda value: (value, None),
        lambda value: {"sample": value, "tokens": torch.tensor(3)},
    ],
)
def test_replays_return_what_the_model_does(form: Callable[[Tensor], object]) -> None:
    seen: list[object] = []

    def sample(answer: Answer) -> Tensor:
        x = noise()
        for _ in range(3):
            output = answer(x, torch.tensor(0.5))
            seen.append(output)
            x = x - only_tensor(output)
        return x

    recorded = record("runs[0]", sample, lambda x, time: form(model(x, time).sample))
    course("runs[0]", sample, recorded)
    assert len(seen) > 3 * recorded.steps
    for output, again in zip(seen[:3], seen[3:6], strict=True):
        assert type(again) is type(output)
        torch.testing.assert_close(again, output, rtol=0, atol=0)


def twice_at_first(answer: Answer) -> Tensor:
    x = noise()
    for step in range(3):
        for _ in range(2 - min(step, 1)):
            output = answer(x, torch.tensor(0.5)).sample
        x = x - output
    return x


def growing(answer: Answer) -> Tensor:
    x = noise()
    for _ in range(3):
        x = torch.cat([x, answer(x, torch.tensor(0.5)).sample])
    return x


def idle(answer: Answer) -> Tensor:
    return noise()


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (twice_at_first, "runs.0. calls the model 2 times on its first step, but not on every one"),
        (growing, "runs.0.: outputs of the model differ in shape"),
        (idle, "runs.0. called the model with 0 different latents"),
    ],
)
def test_runs_that_cannot_be_followed(sample: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record("runs[0]", sample, model)


def test_a_model_of_several_tensors_is_refused() -> None:
    def pair(latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return latents, latents

    with pytest.raises(TypeError, match="the model returns 2 tensors of"):
        record("runs[0]", lambda answer: euler(answer, alone), pair)


def test_a_run_has_to_start_from_the_same_noise() -> None:
    generator = torch.Generator().manual_seed(0)

    def sample(answer: Answer) -> Tensor:
        return euler(answer, alone) + torch.randn(SHAPE, generator=generator)

    with pytest.raises(ValueError, match="gave another result for the same outputs"):
        course("runs[0]", sample, record("runs[0]", sample, model))


def test_a_result_without_the_model_is_refused() -> None:
    def sample(answer: Answer) -> Tensor:
        euler(answer, alone)
        return noise()

    with pytest.raises(ValueError, match="does not depend on what the model returns"):
        course("runs[0]", sample, record("runs[0]", sample, model))
