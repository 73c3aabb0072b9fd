"""The methods after ToCa: forecasts give the authors' numbers at every step, by the authors'
weights; and what single wrong rules give instead, which tells that the right ones are seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import toca_fx
from tests.captured import Captured
from tests.helpers import newest
from tests.marks import slow_but
from tests.system.conformance.cases import FORECASTS, Case, load_case
from toca_fx.plan.units import WHOLE
from toca_fx.policy import Policy, load_policy
from toca_fx.runtime.generation import Generation
from toca_fx.runtime.storage import Storage

pytestmark = pytest.mark.usefixtures("keep_memories")

TOLERANCE = 2e-5  # max abs; the mildest wrong rule below gives 2e-3

_ROUNDING = 1e-6  # of weights in single precision


@pytest.mark.parametrize("name", FORECASTS)
def test_every_step_equals_the_authors_code(name: str) -> None:
    _assert_equal(load_case(name), inner="eager")


@pytest.mark.slow(reason="inductor on ten and more blocks, once per method")
@pytest.mark.parametrize("name", [*FORECASTS, "duca_dit50"])
def test_every_step_through_inductor_equals_the_authors_code(name: str) -> None:
    _assert_equal(load_case(name), inner="inductor")


def _assert_equal(case: Case, inner: str) -> None:
    fast = toca_fx.compile(case.model(), case.kind.policy, inner=inner)
    read = 0
    with torch.no_grad(), toca_fx.session(timesteps=case.timesteps) as run:
        for call in range(case.steps):
            error = (case.run(fast, call) - case.expected(call)).abs().max().item()
            assert error <= TOLERANCE, f"call {call}"
            if "weights" in case.facts:
                read += _assert_weights(case, call, *newest(run))
    kinds = [case.step_kind(call) for call in range(case.steps)]
    assert [step.kind for step in run.report().steps] == kinds
    assert not run.report().warnings
    assert read == ("weights" in case.facts) * sum(kind != "full" for kind in kinds)


def _assert_weights(case: Case, call: int, generation: Generation, storage: Storage) -> bool:
    """Those of all units are the authors'; whether this call reads any."""
    weights = {
        buffer.site: given.tolist()
        for buffer, given in storage.histories.tensors.items()
        if buffer.role == "weights"
    }
    sites = generation.plan.sites
    whole = "S" in case.letters("")
    units = [i for i, site in enumerate(sites) if (site.kind in WHOLE) == whole]
    assert sorted(weights) == units
    expected = case.facts["weights"][call]
    if expected is None:
        return False
    full = [at for at in range(call) if case.step_kind(at) == "full"]
    for own in weights.values():
        by_call = {str(at): weight for at, weight in zip(reversed(full), own, strict=False)}
        apart = [by_call.get(at, 0.0) - expected.get(at, 0.0) for at in {*by_call, *expected}]
        assert max(map(abs, apart)) <= _ROUNDING, f"call {call}"
        assert not any(own[len(full) :]), "nothing else is read"
    return True


Change = Callable[[Policy], Policy]


def forecast(**changes: Any) -> Change:
    return lambda policy: replace(policy, forecast=replace(policy.forecast, **changes))


def scores(**changes: Any) -> Change:
    return lambda policy: replace(policy, scores=replace(policy.scores, **changes))


def bonus(policy: Policy) -> Policy:
    assert policy.spatial is not None
    return replace(policy, spatial=replace(policy.spatial, bonus=0.6))


def counting_from_the_last_full_step(policy: Policy) -> Policy:
    """An even number of steps since then is a skip."""
    since, skipped = 0, []
    for call, letters in enumerate(load_case("duca_dit50").facts["layers"]):
        since = 0 if letters[1] == "F" else since + 1
        skipped += [49 - call] if since and since % 2 == 0 else []
    return replace(policy, skip=tuple(skipped))


REUSE, NEWTON = "order 0 (reuse)", "interpolating polynomial at true times"
PARITY = "parity counted from the last full step"

WRONG: dict[str, dict[str, Change]] = {
    "taylorseer_dit50": {
        "one order less": forecast(order=3),
        "one order more": forecast(order=5),
        REUSE: forecast(order=0),
        NEWTON: forecast(basis="newton"),
    },
    "taylorseer_flux50": {
        "one order less": forecast(order=1),
        "one order more": forecast(order=3),
        REUSE: forecast(order=0),
        NEWTON: forecast(basis="newton", ignore=1),
        "differences from call 1": forecast(ignore=0),
    },
    "spectrum_flux50": {
        "degree 3": forecast(order=3),
        "degree 5": forecast(order=5),
        "ridge 0.01": forecast(ridge=0.01),
        "chebyshev_weight 0.75": forecast(blend=0.75),
        "chebyshev_weight 0 (straight line)": forecast(blend=0.0),
        "last 6 full calls only": forecast(history=6),
    },
    "duca_dit50": {
        "no staleness": scores(staleness=0.0),
        "bonus 0.6": bonus,
        "the other score": scores(self_attention=0.0, small_values=1.0),
        PARITY: counting_from_the_last_full_step,
    },
    "duca_dit50_vnorm": {
        "no staleness": scores(staleness=0.0),
        "bonus 0.6": bonus,
        "the other score": scores(self_attention=1.0, small_values=0.0),
        PARITY: counting_from_the_last_full_step,
    },
}


RULES = [(name, rule) for name, changes in WRONG.items() for rule in changes]
OFTEN = [("taylorseer_flux50", "differences from call 1")]


@pytest.mark.parametrize(
    ("name", "rule"), slow_but(OFTEN, RULES, "the mildest mistake of one forecast is enough")
)
def test_a_single_wrong_rule_gives_what_it_gives_the_authors(name: str, rule: str) -> None:
    """Of the outputs a part is kept, so that the furthest of ours is less far."""
    case = load_case(name)
    theirs = case.facts["wrong_rules"][rule]
    ours = _furthest(case, WRONG[name][rule](load_policy(case.kind.policy)))
    assert theirs / 2.5 <= ours <= 1.2 * theirs
    assert ours > 100 * TOLERANCE


def test_small_values_first_give_the_authors_numbers() -> None:
    case = load_case("duca_dit50_vnorm")
    assert _furthest(case, load_policy(case.kind.policy)) <= TOLERANCE


def _furthest(case: Case, policy: Policy) -> float:
    """How far from the authors' outputs a run ends, at most."""
    captured = _captured(case.name)
    fast = captured.compile(policy)
    with toca_fx.session(timesteps=case.timesteps):
        outputs = [case.cut(fast(inputs), call) for call, inputs in enumerate(captured.inputs)]
    return max(
        (output - case.expected(call)).abs().max().item() for call, output in enumerate(outputs)
    )


@cache
def _captured(name: str) -> Captured:
    case = load_case(name)
    calls = [case.kind.call(case.vectors, call) for call in range(case.steps)]
    return Captured(case.model(), [keywords for _, keywords in calls])
