"""The signals of gates on a few tensors, against their formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import make_policy
from toca_fx.kernels.gates import spectral_change
from toca_fx.match.sites import Matches, Site
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.forecast import weights
from toca_fx.plan.plan import Plan
from toca_fx.plan.planner import make_plan
from toca_fx.plan.times import time_of
from toca_fx.runtime.histories import Histories, Moment
from toca_fx.runtime.signals import EasyCache, Facts, FirstBlock, Sea, Signal, Surprise

OUTPUT = Site("output", "", 0, "", "out", "out", (2, 3, 4))


def planned(signal: str, **sections: Any) -> Plan:
    given = {"N": {"base": 4}, "cache": {"grain": "output"}, **sections}
    given = {"forecast": {"basis": "newton", "order": 1}, **given}
    policy = make_policy(gate={"signal": signal, "threshold": 1}, **given)
    return make_plan(Matches((), (), (OUTPUT,)), policy)


def drawn(count: int, seed: int = 0, shape: tuple[int, ...] = (2, 3, 4, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64))


class Loop:
    """A generation of a signal: steps, full or not, on given latents and outputs."""

    def __init__(self, signal: Signal, plan: Plan, timesteps: Tensor | None = None) -> None:
        self.signal, self.plan, self.timesteps = signal, plan, timesteps
        kept = [torch.zeros(2, 3, 4, dtype=torch.float64) for _ in range(plan.histories[0])]
        self.buffers = {Buffer("cache", 0, part): each for part, each in enumerate(kept)}
        self.buffers[Buffer("weights", 0)] = torch.zeros(len(kept), dtype=torch.float64)
        self.histories = Histories(plan, self.buffers)
        self.position = 0

    def step(self, latents: Tensor | None, output: Tensor | None) -> float | None:
        """A step, full if it has an output; what the signal is ahead of it."""
        now = Moment(self.position, None)
        facts = Facts(latents, self.timesteps, now, self.histories)
        found = self.signal.observe(facts)
        if output is not None:
            self.signal.begin(facts)
        step = self.plan.full_step(self.position) if output is not None else self.plan.steps[1]
        self.histories.prepare(step, now)
        if output is not None:
            self.histories.newest(0).copy_(output.reshape(2, -1)[:, :12].reshape(2, 3, 4))
        self.histories.note(step, now)
        if output is not None:
            self.signal.end(facts, output)
        self.position += 1
        return None if found is None else found.item()


def rows(values: Tensor) -> list[float]:
    return [float(row.square().sum().sqrt()) for row in values]


def test_easycache_is_the_rate_of_the_last_two_full_steps_times_the_change() -> None:
    plan = planned("easycache")
    loop, x, v = Loop(EasyCache(plan), plan), drawn(7), drawn(7, seed=1)
    assert loop.step(x[0], v[0]) is None
    assert loop.step(x[1], None) is None  # one full step tells no rate
    assert loop.step(x[2], v[2]) is None

    def expected(t: int, last: int, before: int) -> float:
        quotients = zip(
            rows(v[last] - v[before]),
            rows(x[last] - x[before]),
            rows(x[t] - x[t - 1]),
            rows(v[last]),
            strict=True,
        )
        return max(dv / dx * now / size for dv, dx, now, size in quotients)

    assert loop.step(x[3], None) == pytest.approx(expected(3, 2, 0), rel=1e-9)
    assert loop.step(x[4], v[4]) == pytest.approx(expected(4, 2, 0), rel=1e-9)
    assert loop.step(x[5], None) == pytest.approx(expected(5, 4, 2), rel=1e-9)
    assert loop.step(x[6], None) == pytest.approx(expected(6, 4, 2), rel=1e-9)
    loop.signal.clear()
    assert loop.step(x[0], None) is None


@pytest.mark.parametrize("signal", ["easycache", "sea"])
def test_latents_may_be_written_over(signal: str) -> None:
    plan = planned(signal, sampler={"steps": 12, "noise": "linear"})
    made = {"easycache": EasyCache, "sea": Sea}[signal]
    found = []
    for in_place in (False, True):
        loop, x, v = Loop(made(plan), plan, torch.tensor(500)), drawn(4), drawn(4, seed=1)
        latents, output = x[0].clone(), v[0].clone()
        values = []
        for t in range(4):
            if in_place:
                latents.copy_(x[t])
                output.copy_(v[t])
            given = (latents, output) if in_place else (x[t], v[t])
            values.append(loop.step(given[0], given[1] if t < 2 else None))
        found.append(values)
    assert found[0] == found[1]
    assert found[0][2] is not None


@pytest.mark.parametrize(
    ("noise", "timestep"),
    [("linear", 250), ("flow", 250), ("flow", 0.25), ("cosine", 999), ("scaled_linear", 0)],
)
def test_sea_takes_the_noise_of_the_timestep(noise: Any, timestep: float) -> None:
    plan = planned("sea", sampler={"steps": 12, "noise": noise})
    loop, x = Loop(Sea(plan), plan, torch.tensor([timestep, timestep])), drawn(3)
    assert loop.step(x[0], x[0]) is None
    log_snr = torch.full((2,), time_of("log_snr", 0, timestep, noise), dtype=torch.float64)
    for t in (1, 2):
        expected = spectral_change(x[t], x[t - 1], log_snr).max().item()
        assert loop.step(x[t], None) == pytest.approx(expected, rel=1e-5)


def test_sea_without_a_timestep_is_the_plain_change() -> None:
    plan = planned("sea", sampler={"steps": 12, "noise": "linear"})
    loop, x = Loop(Sea(plan), plan), drawn(2)
    loop.step(x[0], x[0])
    changes = zip(rows(x[1] - x[0]), rows(x[0]), strict=True)
    assert loop.step(x[1], None) == pytest.approx(max(one / of for one, of in changes))


@pytest.mark.parametrize("signal", [EasyCache, Sea])
def test_latents_that_nobody_knows_measure_nothing(signal: Any) -> None:
    plan = planned("sea", sampler={"steps": 12, "noise": "linear"})
    loop, v = Loop(signal(plan), plan, torch.tensor(500)), drawn(3)
    assert [loop.step(None, each) for each in v] == [None] * 3


@pytest.mark.parametrize("order", [1, 2])
def test_surprise_is_the_error_of_the_forecast_at_the_last_full_step(order: int) -> None:
    forecast = {"basis": "newton", "order": order}
    plan = planned("surprise", forecast=forecast)
    signal = Surprise(plan)
    loop, v = Loop(signal, plan), drawn(12, shape=(2, 3, 4))
    assert not signal.needs
    full: list[int] = []
    rate = None
    for t, is_full in enumerate([1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1]):
        assert loop.step(None, v[t] if is_full else None) == (
            None if rate is None else pytest.approx(rate, rel=1e-9)
        )
        if not is_full:
            continue
        if full:
            kept = full[-order - 1 :]
            found = weights(plan.timelines[0].forecast, tuple(map(float, kept)), float(t))
            pairs = zip(found, reversed(kept), strict=True)
            expected = sum((weight * v[at] for weight, at in pairs), torch.zeros(2, 3, 4))
            errors = zip(rows(v[t] - expected), rows(v[t]), strict=True)
            rate = max(one / of for one, of in errors) / (t - full[-1]) ** (order + 1)
        full.append(t)
    assert signal.estimate([9.0, 0.25], 3) == 0.25 * 3 ** (order + 1)
    signal.clear()
    assert loop.step(None, None) is None


def test_the_power_of_other_bases_is_their_degree() -> None:
    def estimate(**forecast: Any) -> float:
        return Surprise(planned("surprise", forecast=forecast)).estimate([1.0], 2)

    assert estimate(basis="taylor") == 2**2
    assert estimate(basis="chebyshev", order=3) == 2**4
    assert estimate(basis="table", weights=[[2, -1], [3, -3, 1]]) == 2**3


def test_first_block_is_the_change_since_the_last_full_step() -> None:
    plan = planned("first_block")
    signal, added = FirstBlock(plan), drawn(5)
    histories, seen = Loop(signal, plan).histories, []
    for position, value in enumerate(added):
        facts = Facts(None, None, Moment(position, None), histories, lambda value=value: value)
        found = signal.observe(facts)
        seen.append(None if found is None else found.item())
        if position in (0, 3):
            signal.end(facts, None)
    assert seen[0] is None
    for at, full in ((1, 0), (2, 0), (3, 0), (4, 3)):
        change = zip(rows(added[at] - added[full]), rows(added[full]), strict=True)
        expected = max(one / other for one, other in change)
        value = seen[at]
        assert value is not None
        assert signal.estimate([9.0, value], at - full) == pytest.approx(expected, rel=1e-6)
    signal.clear()
    assert signal.observe(Facts(None, None, Moment(5, None), histories, lambda: added[0])) is None
    assert signal.observe(Facts(None, None, Moment(5, None), histories)) is None
