"""What a well-formed policy gets wrong: contradictions, things without effect, likely slips."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, TypeVar

from toca_fx.diagnostics import Problem
from toca_fx.policy.build import build
from toca_fx.policy.check_forecast import check_forecasts
from toca_fx.policy.document import Document, Path
from toca_fx.policy.interval import STEP_INDEX, Interval, Window
from toca_fx.policy.keys import keys_of, rule_keys
from toca_fx.policy.rules import Note, check_rules, sets_weight
from toca_fx.policy.types import Policy
from toca_fx.policy.violations import check_schema

P = TypeVar("P", bound=Policy)


def check(document: Document, kind: type[P]) -> tuple[P, list[Problem]]:
    """The policy in a document and every problem of it, in file order. The policy is usable only
    without errors.
    """
    problems, data, faulty = check_schema(document, kind)
    policy = build(data, document.file, lambda index: document.place(("rules", index)), kind)
    notes = [
        *_check_sampler(policy, data),
        *_check_intervals(policy, data),
        *_check_replaced(policy, data),
        *_check_served(policy, data),
        *_check_choices(policy, data),
    ]
    unclear = _faulty_rules(faulty)
    notes += [*check_forecasts(policy, data, unclear), *check_rules(policy, unclear)]
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


def _check_sampler(policy: Policy, data: dict[str, Any]) -> Iterator[Note]:
    guidance = policy.guidance
    if guidance.selection == "shared" and guidance.layout != "batched":
        message = (
            "`shared` needs `layout: batched`: only the two halves of one batch can share a "
            "selection"
        )
        yield Note(("guidance", "selection"), message)
    every_step = policy.N.first + policy.N.last >= policy.sampler.steps > 1
    if every_step and "steps" in data.get("sampler", {}):
        key = "last" if "last" in data.get("N", {}) else "first"
        forced = f"{policy.N.first} first and {policy.N.last} last forced full steps"
        yield Note(("N", key), f"{forced} leave no partial step among {policy.sampler.steps}")


def _check_intervals(policy: Policy, data: dict[str, Any]) -> Iterator[Note]:
    """The N of the policy and of each rule."""
    known = "steps" in data.get("sampler", {})
    for path, given in _places("N", data):
        yield from _check_windows(path, given, policy.sampler.steps if known else None)
        yield from _check_step_lists(path, given, policy.sampler.steps if known else None)
    if data.get("N") and _always_full(policy.N):
        yield Note(
            ("N", "base"),
            "an interval of 1 makes every step full: nothing is ever reused",
            "warning",
        )


def _places(section: str, data: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Where the mapping of a section stands: in the policy, and in each rule that overrides it."""
    yield (section,), data.get(section, {})
    for index, rule in enumerate(data.get("rules", ())):
        if isinstance(rule.get(section), dict):
            yield ("rules", index, section), rule[section]


def _always_full(interval: Interval) -> bool:
    plain = interval.full_steps is None and not interval.windows
    return plain and interval.base == 1 and interval.drift == 0


def _check_windows(path: Path, given: dict[str, Any], steps: int | None) -> Iterator[Note]:
    windows: list[tuple[Path, Window]] = []
    for index, window in enumerate(given.get("windows", ())):
        if not {declared.name for declared in keys_of(Window)} <= window.keys():
            continue
        place, start, stop = (*path, "windows", index), window["from"], window["to"]
        if start >= stop:
            yield Note(
                (*place, "to"),
                f"the window ends at {stop} but starts at {start}: `from` must be below `to`",
            )
            continue
        windows.append((place, Window(start, stop, window["interval"])))
        if steps is not None and not any(start * steps <= s < stop * steps for s in range(steps)):
            yield Note(place, f"no step of {steps} lies between {start} and {stop}", "warning")
    for (_, first), (place, second) in combinations(windows, 2):
        if first.start < second.stop and second.start < first.stop:
            message = (
                f"overlaps the window from {first.start} to {first.stop}; the earlier one counts"
            )
            yield Note(place, message, "warning")


def _check_step_lists(path: Path, given: dict[str, Any], steps: int | None) -> Iterator[Note]:
    lists = (declared.name for declared in keys_of(Interval) if declared.key.items is STEP_INDEX)
    for name in lists:
        seen: set[int] = set()
        for index, step in enumerate(given.get(name, ())):
            place = (*path, name, index)
            if steps is not None and step >= steps:
                yield Note(
                    place, f"step {step} does not exist: the steps run from 0 to {steps - 1}"
                )
            elif step in seen:
                yield Note(place, f"step {step} is listed twice", "warning")
            seen.add(step)


def _check_replaced(policy: Policy, data: dict[str, Any]) -> Iterator[Note]:
    """Keys whose place another one takes, in the policy or in one rule."""
    for section in rule_keys(type(policy)).sections.values():
        for path, given in _places(section.name, data):
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
        scores.weights
        or not selecting
        or not 0 < policy.R.base < 1
        or any(sets_weight(rule, keys) for rule in policy.rules)
    ):
        return
    where: Path = ("scores",) if "scores" in data else ()
    names = " and ".join(f"`{kind}`" for kind in selecting)
    message = f"all scores are zero, so {names} would always compute the same tokens"
    yield Note(where, message, "warning", key=True)
