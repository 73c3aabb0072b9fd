"""Plans with a gate: what it cannot change, what it leaves open, and how many steps are full."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import make_policy
from toca_fx.match.sites import Matches, Site
from toca_fx.plan.plan import Plan
from toca_fx.plan.planner import make_plan

MLP = Site("mlp", "blocks.0.mlp", 0, "blocks", "o", "a", (2, 64, 8))
OUTPUT = Site("output", "", 0, "", "out", "out", (2, 64, 4))
EASY = {"signal": "easycache", "threshold": 0.1}
WHOLE = {"cache": {"grain": "output"}, "forecast": {"basis": "newton", "order": 2}}


def planned(steps: int = 10, **sections: Any) -> Plan:
    given = {"modules": {"mlp": {"weight": 1.0}}, "gate": EASY, **sections}
    policy = make_policy(sampler={"steps": steps}, **given)
    return make_plan(Matches((MLP,), (), (OUTPUT,)), policy)


def kinds(steps: Any) -> str:
    return "".join(step.kind[0] for step in steps)


@pytest.mark.parametrize(
    ("sections", "leaves", "fewest", "least"),
    [
        # N.base bounds how far full steps are apart.
        ({"N": {"base": 4}}, "fppppppppp", "fpppfpppfp", 3),
        ({"N": {"base": 1}}, "fppppppppp", "ffffffffff", 10),
        ({"N": {"base": 4, "first": 2, "last": 1}}, "ffpppppppf", "ffpppfpppf", 4),
        ({"N": {"base": 4, "extra_full_steps": [6]}}, "fpppppfppp", "fpppfpfppp", 3),
        # What else it says of other steps counts for nothing.
        ({"N": {"base": 4, "drift": 0.5, "growth": 2}}, "fppppppppp", "fpppfpppfp", 3),
        # at_most says it as well, and without N.base.
        ({"N": {"first": 2}, "gate": {**EASY, "at_most": 2}}, "ffpppppppp", "ffppfppfpp", 4),
        ({"N": {"base": 9}, "gate": {**EASY, "at_most": 2}}, "fppppppppp", "fppfppfppf", 4),
        # Beside a list there is no bound.
        ({"N": {"full_steps": [0, 7]}}, "fppppppfpp", "fppppppfpp", 2),
        (
            {"N": {"full_steps": [0, 7]}, "gate": {**EASY, "at_most": 3}},
            "fppppppfpp",
            "fpppfppfpp",
            3,
        ),
        # Steps without any block.
        ({"N": {"base": 4}, **WHOLE}, "fsssssssss", "fsssfsssfs", 3),
        ({"N": {"base": 4}, "skip": [2, 3, 5]}, "fpsspspppp", "fpssfsppfp", 3),
    ],
)
def test_forced_steps_are_full_and_the_others_open(
    sections: dict[str, Any], leaves: str, fewest: str, least: int
) -> None:
    plan = planned(**sections)
    assert kinds(plan.steps) == leaves
    assert kinds(plan.fewest) == fewest
    assert plan.full_range == (least, 10)
    # All kinds are known ahead, and a step that becomes full is one of them.
    assert {step.modes for step in plan.fewest} <= {step.modes for step in plan.steps}


def test_descending_steps_are_counted_by_calls() -> None:
    sampler = {"steps": 10, "order": "descending"}
    policy = make_policy(sampler=sampler, N={"base": 4, "first": 2}, gate=EASY)
    plan = make_plan(Matches((MLP,), ()), policy)
    assert [step.index for step in plan.fewest if step.kind == "full"] == [9, 8, 4, 0]


def test_a_rule_may_force_steps_of_a_site() -> None:
    other = Site("mlp", "blocks.1.mlp", 1, "blocks", "p", "b", (2, 64, 8))
    rules = [{"layers": 1, "N": {"extra_full_steps": [2]}}]
    policy = make_policy(sampler={"steps": 6}, N={"base": 4}, gate=EASY, rules=rules)
    plan = make_plan(Matches((MLP, other), ()), policy)
    assert kinds(plan.steps) == "fpmppp"
    assert kinds(plan.fewest) == "fpmpfp"  # a mixed one is not full


def test_without_a_gate_the_range_is_one_number() -> None:
    policy = make_policy(sampler={"steps": 10}, N={"base": 4})
    plan = make_plan(Matches((MLP,), ()), policy)
    assert plan.fewest is plan.steps
    assert plan.full_range == (3, 3)


def test_histories_are_for_any_number_of_full_steps() -> None:
    chebyshev = {"basis": "chebyshev", "order": 3}
    assert planned(N={"base": 4}, **{**WHOLE, "forecast": chebyshev}).histories[-1] == 10
    assert planned(N={"base": 4}, **WHOLE).histories[-1] == 3


def test_a_plan_of_any_number_of_steps_has_the_bound() -> None:
    policy = make_policy(sampler={"steps": 10}, N={"base": 4, "first": 0.2}, gate=EASY)
    plan = make_plan(Matches((MLP,), ()), policy, 15)
    assert kinds(plan.fewest) == "fffpppfpppfpppf"


@pytest.mark.parametrize(
    ("grain", "scales"), [("output", True), ("model", True), ("module", False)]
)
def test_a_gate_that_skips_suits_any_number_of_steps(grain: str, scales: bool) -> None:
    policy = make_policy(
        N={"first": 2, "last": 0.1}, cache={"grain": grain}, gate={**EASY, "at_most": 3}
    )
    assert make_plan(Matches((MLP,), (), (OUTPUT,)), policy).settings.scales == scales
