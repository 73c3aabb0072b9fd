"""One declaration per key: schema, validation, dataclasses, checks and reference follow from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from toca_fx.policy import Interval, Policy, Ratio, Scores, SitePolicy, scores_of
from toca_fx.policy.check import check
from toca_fx.policy.document import from_mapping
from toca_fx.policy.keys import Key, Score, is_mapping, key, keys_of, rule_keys
from toca_fx.policy.schema import policy_schema

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class WarmInterval(Interval):
    """With a key that a list of full steps makes superfluous."""

    thaw: int = field(
        default=2,
        metadata=key("Steps to thaw.", minimum=1, maximum=9, replaced_by="full_steps"),
    )


@dataclass(frozen=True)
class WarmRatio(Ratio):
    """With a number that has a default, and a list under a name that Python cannot have."""

    warmth: float = field(
        default=0.5,
        metadata=key("How warm the stale tokens are kept.", minimum=0, maximum=1, examples=(0.7,)),
    )
    places: tuple[int, ...] = field(default=(), metadata=key("Where.", name="in", title="places"))


@dataclass(frozen=True)
class WarmScores(Scores):
    """With one more score."""

    heat: float = field(
        default=0.0, metadata=key("Weight of heat.", minimum=0, score=Score("ahead"))
    )


def as_in_policy(name: str) -> dict[str, Key]:
    """The metadata of a key of the real format."""
    [said] = (declared.key for declared in keys_of(Policy) if declared.name == name)
    return {"key": said}


@dataclass(frozen=True, kw_only=True)
class WarmPolicy(Policy):
    """The format with keys that it does not have."""

    N: WarmInterval = field(metadata=as_in_policy("N"))
    R: WarmRatio = field(metadata=as_in_policy("R"))
    scores: WarmScores = field(default=WarmScores(), metadata=as_in_policy("scores"))


def warm(**sections: object) -> tuple[WarmPolicy, list[str]]:
    given: dict[str, Any] = {
        "version": 1,
        "name": "warm",
        "sampler": {"steps": 20},
        "N": {"base": 3},
        "R": {"base": 0.9},
        "scores": {"staleness": 1.0},
    }
    policy, problems = check(from_mapping({**given, **sections}), WarmPolicy)
    return policy, [str(problem) for problem in problems]


def test_schema_has_a_key_once_it_is_declared() -> None:
    assert policy_schema(WarmPolicy)["definitions"]["R"]["properties"]["warmth"] == {
        "description": "How warm the stale tokens are kept.",
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 0.5,
        "examples": [0.7],
    }
    assert "warmth" not in policy_schema()["definitions"]["R"]["properties"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"warmth": 2}, "R.warmth: `warmth` must be between 0 and 1, got `2`"),
        ({"warmth": "hot"}, "R.warmth: expected a number, got `hot`"),
        ({"warmht": 0.2}, "R.warmht: unknown key `warmht`; did you mean `warmth`?"),
        ({"in": 3}, "R.in: expected places, got `3`"),
    ],
)
def test_validation_knows_a_key_once_it_is_declared(given: dict[str, object], problem: str) -> None:
    assert warm(R={"base": 0.9, **given})[1] == [problem]
    rules = [{"match": "mlp", "R": given}]
    assert warm(rules=rules)[1] == [f"rules[0].{problem}"]


def test_dataclasses_get_a_key_once_it_is_declared() -> None:
    assert WarmRatio(0.9, warmth=0.5) == warm()[0].R
    rules = [{"layers": 3, "R": {"warmth": 1}}]
    policy, problems = warm(R={"base": 0.9, "warmth": 0.25, "in": [3.0]}, rules=rules)
    assert problems == []
    assert WarmRatio(0.9, warmth=0.25, places=(3,)) == policy.R
    assert WarmRatio(0.9, warmth=1.0, places=(3,)) == policy.for_site("mlp", "blocks.3.ff", 3).R


def test_checks_go_by_the_declaration() -> None:
    listed = {"base": 3, "full_steps": [0, 5], "thaw": 3}
    assert "N.thaw: warning: `thaw` is ignored: `full_steps` takes its place" in warm(N=listed)[1]
    rules = [{"match": "mlp", "N": {"thaw": 4}}]
    assert warm(N={"full_steps": [0, 5]}, rules=rules)[1] == [
        "rules[0].N.thaw: warning: `thaw` has no effect: the policy's `N.full_steps` "
        "takes its place"
    ]
    rules = [{"match": "mlp", "N": {"thaw": 4}}, {"match": "mlp", "N": {"full_steps": [0, 5]}}]
    assert warm(rules=rules)[1] == [
        "rules[0]: the rule has no effect: everything it sets is set again by the later rule "
        "rules[1]"
    ]


def test_a_declared_weight_is_a_score() -> None:
    assert tuple(scores_of(WarmScores)) == (*scores_of(), "heat")
    policy, problems = warm(scores={"heat": 2})
    assert (policy.scores.weights, problems) == ({"heat": 2.0}, [])


def test_reference_shows_a_key_once_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import policy_reference

    row = (
        "| `warmth` | number, between 0 and 1 | `0.5` | "
        "How warm the stale tokens are kept. For example `0.7`. |"
    )
    assert row in policy_reference.render(policy_schema(WarmPolicy), "").splitlines()


def test_names_in_declarations_exist() -> None:
    """Keys that are said to stand for, replace or serve others name neighbours."""
    sections = [declared.type for declared in keys_of(Policy) if is_mapping(declared.type)]
    for keys in map(keys_of, sections):
        names = {"", *(declared.name for declared in keys)}
        for said in (declared.key for declared in keys):
            assert {said.required_unless, said.replaced_by, said.serves} <= names


def test_a_site_has_every_section_that_rules_override() -> None:
    assert rule_keys(Policy).sections.keys() < {
        attribute.name for attribute in dataclasses.fields(SitePolicy)
    }
