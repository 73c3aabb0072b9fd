"""What the forecasts of a policy, and of its rules, get wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

from toca_fx.diagnostics import any_of
from toca_fx.policy.document import Path
from toca_fx.policy.forecast import Forecast
from toca_fx.policy.keys import keys_of
from toca_fx.policy.rules import Note, covers, may_overlap
from toca_fx.policy.types import Policy, Rule

_SECTION = "forecast"


def check_forecasts(policy: Policy, data: Mapping[str, Any], faulty: set[int]) -> Iterator[Note]:
    """Contradictions in forecasts, and keys that their bases do not heed.

    The `faulty` rules were only read in part, and are left out.
    """
    noise = policy.sampler.noise is not None
    rules = {index: rule for index, rule in enumerate(policy.rules) if index not in faulty}
    of_rules = {name: _own(rule) for name, rule in rules.items()}
    bases = {policy.forecast.basis, *(own["basis"] for own in of_rules.values() if "basis" in own)}
    given = data.get(_SECTION, {})
    yield from _without_effect((_SECTION,), given, bases)
    yield from _contradictions((_SECTION,), given, policy.forecast, noise)
    for index, own in of_rules.items():
        path: Path = ("rules", index, _SECTION)
        yield from _without_effect(path, own, _bases(policy, rules[index], rules.values()))
        forecast = _settled(policy, rules[index], rules.values())
        if forecast is not None:
            in_force = {key: value for key, value in own.items() if getattr(forecast, key) == value}
            yield from _contradictions(path, in_force, forecast, noise)


def _own(rule: Rule) -> dict[str, Any]:
    """What a rule says of the forecast, by key."""
    dotted = ((*key.partition("."), value) for key, value in rule.overrides)
    return {leaf: value for section, _, leaf, value in dotted if section == _SECTION}


def _bases(policy: Policy, rule: Rule, rules: Iterable[Rule]) -> set[str]:
    """The bases that modules may have which a rule matches, all rules applied."""
    possible: set[str] = {policy.forecast.basis}
    for other in rules:
        basis = _own(other).get("basis")
        if basis is not None and may_overlap(other, rule):
            possible = {basis} if covers(other, rule) else possible | {basis}
    return possible


def _settled(policy: Policy, rule: Rule, rules: Iterable[Rule]) -> Forecast | None:
    """The forecast of all modules that a rule matches; None if others change that of some."""
    forecast = policy.forecast
    for other in rules:
        own = _own(other)
        if own and may_overlap(other, rule):
            if not covers(other, rule):
                return None
            forecast = replace(forecast, **own)
    return forecast


def _without_effect(path: Path, given: Mapping[str, Any], bases: set[str]) -> Iterator[Note]:
    """Keys that none of the ``bases`` heeds."""
    for declared in keys_of(Forecast):
        heeding = declared.key.bases
        if heeding and not bases & {*heeding} and given.get(declared.name) is not None:
            of, this = any_of(heeding), any_of(sorted(bases))
            message = f"`{declared.name}` has no effect with basis {this}: it is for {of}"
            yield Note((*path, declared.name), message, "warning", key=True)


class _Contradiction(NamedTuple):
    """Keys that do not go together, the one at fault first."""

    keys: tuple[str, ...]
    message: str


def _contradictions(
    path: Path, given: Mapping[str, Any], forecast: Forecast, noise: bool
) -> Iterator[Note]:
    """What is wrong with a forecast on account of keys that are ``given`` at a path."""
    for keys, message in (
        *_of_weights(forecast),
        *_of_history(forecast),
        *_of_time(forecast, noise),
    ):
        at = next((key for key in keys if key in given), None)
        if at is not None:
            yield Note((*path, at), message)


def _of_weights(forecast: Forecast) -> Iterator[_Contradiction]:
    if forecast.basis == "table" and forecast.weights is None:
        message = (
            "`table` needs `weights`: for each step since the last full one a list of numbers, "
            "newest value first"
        )
        yield _Contradiction(("basis", "weights"), message)


def _of_history(forecast: Forecast) -> Iterator[_Contradiction]:
    least, key, why = _least_history(forecast)
    if forecast.history is not None and forecast.history < least:
        message = f"a history of {forecast.history} is too short: {why} {least} values"
        yield _Contradiction(("history", key, "basis"), message)


def _least_history(forecast: Forecast) -> tuple[int, str, str]:
    """How many values a forecast is made of; the key that needs them, and in what words."""
    if forecast.basis == "reuse":
        return 1, "basis", "`reuse` needs"
    if forecast.basis == "table":
        longest = max(map(len, forecast.weights or ((),)))
        own = (longest, "weights", "the longest list of `weights` is for")
    elif forecast.basis == "chebyshev":
        own = (2, "basis", "a fit needs at least")
    else:
        order = 1 if forecast.order is None else forecast.order
        own = (order + 1, "order", f"order {order} needs")
    if forecast.blend in (None, 1.0):
        return own
    return max(own, (2, "blend", "the line of `blend` needs"), key=itemgetter(0))


def _of_time(forecast: Forecast, noise: bool) -> Iterator[_Contradiction]:
    if forecast.basis != "reuse" and forecast.time in ("sigma", "log_snr") and not noise:
        message = (
            f"`{forecast.time}` needs `sampler.noise`, which says how it follows from the timestep"
        )
        yield _Contradiction(("time", "basis"), message)
