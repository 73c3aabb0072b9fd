"""The weights that a plan leads to: those of steps that come as planned, at even timesteps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.helpers import make_policy
from toca_fx.match.sites import Matches, Site
from toca_fx.plan.forecast import weights
from toca_fx.plan.plan import Plan
from toca_fx.plan.planned import planned_weights
from toca_fx.plan.planner import make_plan
from toca_fx.plan.times import time_of

STATE = Site("state", "", 0, "", "state", "state", (2, 64, 8))


def plan_of(**sections: Any) -> Plan:
    policy = make_policy(cache={"grain": "model"}, **sections)
    return make_plan(Matches((), (), states=(STATE,)), policy)


def test_calls_between_full_ones_read_what_these_left() -> None:
    plan = plan_of(sampler={"steps": 8}, forecast={"basis": "newton", "order": 1})
    (timeline,) = plan.timelines
    found = dict(planned_weights(plan, timeline))
    assert list(found) == [1, 2, 4, 5, 7]
    assert found[1] == (1.0,)
    assert found[5] == pytest.approx((5 / 3, -2 / 3))
    assert found[7] == pytest.approx((4 / 3, -1 / 3))


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_the_order_of_step_indices_changes_nothing(order: str) -> None:
    plan = plan_of(sampler={"steps": 8, "order": order}, forecast={"basis": "taylor", "order": 2})
    (timeline,) = plan.timelines
    assert [call for call, _ in planned_weights(plan, timeline)] == [1, 2, 4, 5, 7]


@pytest.mark.parametrize(("noise", "first"), [("flow", 1000.0), ("linear", 875.0)])
def test_other_axes_are_read_at_even_timesteps(noise: str, first: float) -> None:
    plan = plan_of(
        sampler={"steps": 8, "noise": noise},
        forecast={"basis": "newton", "order": 1, "time": "log_snr"},
    )
    (timeline,) = plan.timelines
    times = [
        time_of("log_snr", 0, first - 125.0 * call, plan.settings.noise or "flow")
        for call in range(8)
    ]
    found = dict(planned_weights(plan, timeline))
    assert found[5] == weights(timeline.forecast, (times[0], times[3]), times[5], 2)


def test_a_gate_leaves_as_few_full_steps_as_it_may() -> None:
    gate = {"signal": "easycache", "threshold": 0.1, "at_most": 3}
    plan = plan_of(sampler={"steps": 8}, gate=gate, forecast={"basis": "newton", "order": 1})
    assert [step.kind for step in plan.fewest].count("full") == 2
    (timeline,) = plan.timelines
    assert [call for call, _ in planned_weights(plan, timeline)] == [1, 2, 3, 5, 6, 7]
    assert [
        step.kind for step in replace(plan, settings=replace(plan.settings, gate=None)).fewest
    ].count("full") == 1
