"""What a well-formed policy gets wrong: contradictions, things without effect, likely slips."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from toca_fx.diagnostics import Problem
from toca_fx.policy.build import build
from toca_fx.policy.document import Document, Path
from toca_fx.policy.rules import Note, check_rules, reads_scores
from toca_fx.policy.schema import check_schema
from toca_fx.policy.types import Interval, Policy, Window

_REPLACED = ("base", "drift", "phase", "windows")  # what `N.full_steps` takes the place of


def check(document: Document) -> tuple[Policy, list[Problem]]:
    """The policy in a document and every problem of it, in file order. The policy is usable only
    without errors.
    """
    problems, data, faulty = check_schema(document)
    policy = build(data, document.file, lambda index: document.place(("rules", index)))
    notes = [
        *_check_sampler(policy, data),
        *_check_intervals(policy, data),
        *_check_choices(policy, data),
    ]
    notes += check_rules(policy, _faulty_rules(faulty))
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
        message = "`shared` needs `layout: batched`: only the two halves of one batch can share a selection"
        yield Note(("guidance", "selection"), message)
    every_step = policy.N.first + policy.N.last >= policy.sampler.steps > 1
    if every_step and "steps" in data.get("sampler", {}):
        key = "last" if "last" in data.get("N", {}) else "first"
        forced = f"{policy.N.first} first and {policy.N.last} last forced full steps"
        yield Note(("N", key), f"{forced} leave no partial step among {policy.sampler.steps}")


def _check_intervals(policy: Policy, data: dict[str, Any]) -> Iterator[Note]:
    """The N of the policy and of each rule."""
    known = "steps" in data.get("sampler", {})
    places: list[tuple[Path, dict[str, Any]]] = [(("N",), data.get("N", {}))]
    places += [
        (("rules", index, "N"), rule["N"])
        for index, rule in enumerate(data.get("rules", ()))
        if "N" in rule
    ]
    for path, given in places:
        yield from _check_windows(path, given, policy.sampler.steps if known else None)
        yield from _check_step_lists(path, given, policy.sampler.steps if known else None)
    if data.get("N") and _always_full(policy.N):
        yield Note(
            ("N", "base"),
            "an interval of 1 makes every step full: nothing is ever reused",
            "warning",
        )


def _always_full(interval: Interval) -> bool:
    plain = interval.full_steps is None and not interval.windows
    return plain and interval.base == 1 and interval.drift == 0


def _check_windows(path: Path, given: dict[str, Any], steps: int | None) -> Iterator[Note]:
    windows: list[tuple[Path, Window]] = []
    for index, window in enumerate(given.get("windows", ())):
        if not {"from", "to", "interval"} <= window.keys():
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
    for key in ("full_steps", "extra_full_steps"):
        seen: set[int] = set()
        for index, step in enumerate(given.get(key, ())):
            place = (*path, key, index)
            if steps is not None and step >= steps:
                yield Note(
                    place, f"step {step} does not exist: the steps run from 0 to {steps - 1}"
                )
            elif step in seen:
                yield Note(place, f"step {step} is listed twice", "warning")
            seen.add(step)
    if "full_steps" in given:
        for key in _REPLACED:
            if key in given:
                yield Note(
                    (*path, key),
                    f"`{key}` is ignored: `full_steps` takes its place",
                    "warning",
                    key=True,
                )


def _check_choices(policy: Policy, data: dict[str, Any]) -> Iterator[Note]:
    scores = policy.scores
    judged = scores.self_attention or any(
        "scores.self_attention" in dict(rule.overrides) for rule in policy.rules
    )
    if "queries" in data.get("scores", {}) and not judged:
        message = (
            "`queries` has no effect: it says how `self_attention` is found, whose weight is 0"
        )
        yield Note(("scores", "queries"), message, "warning", key=True)
    selecting = [kind for kind, action in policy.modules if action.mode == "partial"]
    if (
        scores.weights
        or not selecting
        or not 0 < policy.R.base < 1
        or any(map(reads_scores, policy.rules))
    ):
        return
    where: Path = ("scores",) if "scores" in data else ()
    names = " and ".join(f"`{kind}`" for kind in selecting)
    message = f"all scores are zero, so {names} would always compute the same tokens"
    yield Note(where, message, "warning", key=True)
