"""What a well-formed policy gets wrong: contradictions, things without effect, likely slips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from toca_fx.diagnostics import Problem
from toca_fx.policy.build import build
from toca_fx.policy.check_forecast import check_forecasts
from toca_fx.policy.check_gate import check_gate
from toca_fx.policy.check_steps import check_steps, places_of
from toca_fx.policy.document import Document, Path
from toca_fx.policy.keys import keys_of, rule_keys
from toca_fx.policy.rules import Note, check_rules, sets_weight
from toca_fx.policy.settings import WHOLE_GRAINS
from toca_fx.policy.types import Policy
from toca_fx.policy.violations import check_schema

P = TypeVar("P", bound=Policy)


def check(document: Document, kind: type[P]) -> tuple[P, list[Problem]]:
    """The policy in a document and every problem of it, in file order. The policy is usable only
    without errors.
    """
    problems, data, faulty = check_schema(document, kind)
    policy = build(data, document.file, lambda index: document.place(("rules", index)), kind)
    unclear = _faulty_rules(faulty)
    notes = [
        *_check_guidance(policy),
        *check_steps(policy, data, unclear),
        *_check_replaced(policy, data),
        *_check_served(policy, data),
        *_check_choices(policy, data),
    ]
    notes += [*check_forecasts(policy, data, unclear), *check_rules(policy, unclear)]
    notes += check_gate(policy, data)
    problems += [
        document.problem(note.path, note.message, note.severity, key=note.key) for note in notes
    ]
    everything = dict.fromkeys([*document.problems, *problems])  # without repetitions
    return policy, sorted(everything, key=lambda problem: (problem.line, problem.column))


def _faulty_rules(faulty: set[Path]) -> set[int]:
    """Rules that were only read in part: nothing more can be said about their effect."""
    return {
        path[1]
        for path in faulty
        if len(path) > 1 and path[0] == "rules" and isinstance(path[1], int)
    }


def _check_guidance(policy: Policy) -> Iterator[Note]:
    guidance = policy.guidance
    if guidance.selection == "shared" and guidance.layout != "batched":
        message = (
            "`shared` needs `layout: batched`: only the two halves of one batch can share a "
            "selection"
        )
        yield Note(("guidance", "selection"), message)


def _check_replaced(policy: Policy, data: dict[str, Any]) -> Iterator[Note]:
    """Keys whose place another one takes, in the policy or in one rule."""
    for section in rule_keys(type(policy)).sections.values():
        for path, given in places_of(section.name, data):
            for declared in keys_of(section.type):
                other = declared.key.replaced_by
                if declared.name in given and other in given:
                    message = f"`{declared.name}` is ignored: `{other}` takes its place"
                    yield Note((*path, declared.name), message, "warning", key=True)


def _check_served(policy: Policy, data: dict[str, Any]) -> Iterator[Note]:
    """Keys that say how a score is found which has no weight anywhere."""
    weights = policy.scores.weights.keys()
    set_by_rules = {leaf for rule in policy.rules for leaf, _ in rule.overrides}
    for declared in keys_of(type(policy.scores)):
        served = declared.key.serves
        judged = served in weights or f"scores.{served}" in set_by_rules
        if served and declared.name in data.get("scores", {}) and not judged:
            message = (
                f"`{declared.name}` has no effect: it says how `{served}` is found, "
                "whose weight is 0"
            )
            yield Note(("scores", declared.name), message, "warning", key=True)


def _check_choices(policy: Policy, data: dict[str, Any]) -> Iterator[Note]:
    keys, scores = rule_keys(type(policy)), policy.scores
    selecting = [kind for kind, action in policy.modules if action.mode == "partial"]
    if (
        policy.cache.grain in WHOLE_GRAINS
        or policy.skip == "all"
        or scores.weights
        or not selecting
        or not 0 < policy.R.base < 1
        or any(sets_weight(rule, keys) for rule in policy.rules)
    ):
        return
    where: Path = ("scores",) if "scores" in data else ()
    names = " and ".join(f"`{kind}`" for kind in selecting)
    message = f"all scores are zero, so {names} would always compute the same tokens"
    yield Note(where, message, "warning", key=True)
