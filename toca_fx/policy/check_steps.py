"""What a policy, and its rules, get wrong about which steps are full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from toca_fx.policy.document import Path
from toca_fx.policy.interval import Interval, Window
from toca_fx.policy.keys import keys_of
from toca_fx.policy.rules import Note, settled
from toca_fx.policy.settings import WHOLE_GRAINS
from toca_fx.policy.types import Policy

_Given = Mapping[str, Any]


def check_steps(policy: Policy, data: _Given, faulty: set[int]) -> Iterator[Note]:
    """The N of the policy and of each rule.

    The `faulty` rules were only read in part.
    """
    steps = policy.sampler.steps if "steps" in data.get("sampler", {}) else None
    for path, given in places_of("N", data):
        yield from _check_windows(path, given, steps)
        yield from _check_lists(path, given, steps)
    yield from _check_ends(policy, data, steps)
    yield from _check_growth(policy, data, faulty)
    yield from _check_skipped(policy, data, steps)
    yield from _check_grain(policy, data)
    unbound = policy.gate is None or policy.gate.at_most is None
    if data.get("N") and unbound and _always_full(policy.N):
        yield Note(
            ("N", "base"),
            "an interval of 1 makes every step full: nothing is ever reused",
            "warning",
        )


def places_of(section: str, data: _Given) -> Iterator[tuple[Path, _Given]]:
    """Where the mapping of a section stands: in the policy, and in each rule that overrides it."""
    yield (section,), data.get(section, {})
    for index, rule in enumerate(data.get("rules", ())):
        if isinstance(rule.get(section), dict):
            yield ("rules", index, section), rule[section]


def _always_full(interval: Interval) -> bool:
    plain = interval.full_steps is None and not interval.windows
    return plain and interval.base == 1 and interval.drift == interval.growth == 0


def _check_ends(policy: Policy, data: _Given, steps: int | None) -> Iterator[Note]:
    if steps is None or steps == 1:
        return
    first, last = policy.N.ends(steps)
    if first + last >= steps:
        key = "last" if "last" in data.get("N", {}) else "first"
        forced = f"{first} first and {last} last forced full steps"
        yield Note(("N", key), f"{forced} leave no partial step among {steps}")


def _check_growth(policy: Policy, data: _Given, faulty: set[int]) -> Iterator[Note]:
    """A growth beside the phase that has none."""
    for path, given in places_of("N", data):
        interval: Interval | None = policy.N
        if len(path) > 1:
            index = int(path[1])
            interval = None if index in faulty else settled(policy, policy.rules[index], "N")
        at = next((key for key in ("growth", "phase") if key in given), None)
        if interval is None or at is None or interval.full_steps is not None:
            continue
        if interval.growth and interval.phase != "count":
            message = f"`growth` needs `phase: count`: `{interval.phase}` counts from no full step"
            yield Note((*path, at), message)


def _check_skipped(policy: Policy, data: _Given, steps: int | None) -> Iterator[Note]:
    """Steps that run no block."""
    skip = policy.skip
    if isinstance(skip, tuple):
        yield from check_indices(("skip",), skip, steps)
        listed = policy.N.full_steps
        full = {*policy.N.extra_full_steps, *(listed if isinstance(listed, tuple) else ())}
        for index, step in enumerate(skip):
            if policy.N.by_index and step in full:
                yield Note(("skip", index), f"step {step} is not skipped: it is full", "warning")
    if policy.cache.grain in WHOLE_GRAINS and skip not in ("none", "all"):
        given = "a list" if isinstance(skip, tuple) else f"`{skip}`"
        message = (
            f"{given} contradicts `cache.grain: {policy.cache.grain}`, with which no module has a "
            "cache: between full steps there is nothing else to compute, and all are skipped"
        )
        yield Note(("skip",), message)


def _check_grain(policy: Policy, data: _Given) -> Iterator[Note]:
    """The grain of the model, which no rule can give to a part of it."""
    for path, given in places_of("cache", data):
        place = (*path, "grain")
        if len(path) == 1 or "grain" not in given:
            continue
        if given["grain"] in WHOLE_GRAINS:
            message = (
                f"`{given['grain']}` is of the whole model: it stands in the policy's own `cache`"
            )
            yield Note(place, message)
        elif policy.cache.grain in WHOLE_GRAINS:
            message = (
                f"`grain` has no effect: the policy's `cache.grain: {policy.cache.grain}` is of "
                "all modules"
            )
            yield Note(place, message, "warning", key=True)


def _check_windows(path: Path, given: _Given, steps: int | None) -> Iterator[Note]:
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


def _check_lists(path: Path, given: _Given, steps: int | None) -> Iterator[Note]:
    """Steps that are listed: by index, as places, or for a number of steps of their own."""
    yield from check_indices((*path, "extra_full_steps"), given.get("extra_full_steps", ()), steps)
    listed, here = given.get("full_steps", ()), (*path, "full_steps")
    if isinstance(listed, Mapping):
        yield from check_indices((*here, "at"), listed.get("at", ()), listed.get("of"))
    elif all(step == int(step) for step in listed):
        yield from check_indices(here, listed, steps)
    else:
        yield from _check_places(here, listed)


def check_indices(path: Path, listed: Sequence[int], steps: int | None) -> Iterator[Note]:
    """A list of step indices at a path; None where the number of steps is not known."""
    for index, step in enumerate(listed):
        place = (*path, index)
        if steps is not None and step >= steps:
            yield Note(place, f"step {step} does not exist: the steps run from 0 to {steps - 1}")
    yield from _check_twice(path, "step", listed)


def _check_places(path: Path, listed: Sequence[float]) -> Iterator[Note]:
    for index, place in enumerate(listed):
        if place >= 1:
            message = (
                f"{place} is no place below 1: a list of full steps holds places, or step indices, "
                "not both"
            )
            yield Note((*path, index), message)
    yield from _check_twice(path, "place", listed)


def _check_twice(path: Path, what: str, listed: Sequence[float]) -> Iterator[Note]:
    first = {value: index for index, value in reversed([*enumerate(listed)])}
    for index, value in enumerate(listed):
        if first[value] != index:
            yield Note((*path, index), f"{what} {value} is listed twice", "warning")
