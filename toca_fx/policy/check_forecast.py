"""What the forecasts of a policy, and of its rules, get wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from toca_fx.diagnostics import any_of
from toca_fx.policy.document import Path
from toca_fx.policy.forecast import Forecast
from toca_fx.policy.keys import keys_of
from toca_fx.policy.rules import Note, covers, may_overlap, own, settled
from toca_fx.policy.types import Policy, Rule

_SECTION = "forecast"


def check_forecasts(policy: Policy, data: Mapping[str, Any], faulty: set[int]) -> Iterator[Note]:
    """Contradictions in forecasts, and keys that their bases do not heed.

    The `faulty` rules were only read in part, and are left out.
    """
    noise = policy.sampler.noise is not None
    rules = {index: rule for index, rule in enumerate(policy.rules) if index not in faulty}
    given, of_rules = data.get(_SECTION, {}), [own(rule, _SECTION) for rule in rules.values()]
    bases: set[str] = {policy.forecast.basis}
    bases.update(said["basis"] for said in of_rules if "basis" in said)
    yield from _without_effect((_SECTION,), given, bases)
    yield from _contradictions((_SECTION,), given, policy.forecast, noise)
    for index, rule in rules.items():
        path, said = ("rules", index, _SECTION), own(rule, _SECTION)
        yield from _without_effect(path, said, _bases(policy, rule, rules.values()))
        forecast: Forecast | None = settled(policy, rule, _SECTION)
        if forecast is not None:
            in_force = {key: said[key] for key in said if getattr(forecast, key) == said[key]}
            yield from _contradictions(path, in_force, forecast, noise)


def _bases(policy: Policy, rule: Rule, rules: Iterable[Rule]) -> set[str]:
    """The bases that modules may have which a rule matches, all rules applied."""
    possible: set[str] = {policy.forecast.basis}
    for other in rules:
        basis = own(other, _SECTION).get("basis")
        if basis is not None and may_overlap(other, rule):
            possible = {basis} if covers(other, rule) else possible | {basis}
    return possible


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
    found = [*_of_weights(forecast), *_of_history(forecast), *_of_time(forecast, noise)]
    for keys, message in found:
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
        least = (longest, "weights", "the longest list of `weights` is for")
    elif forecast.basis == "chebyshev":
        least = (2, "basis", "a fit needs at least")
    else:
        order = 1 if forecast.order is None else forecast.order
        least = (order + 1, "order", f"order {order} needs")
    if forecast.blend in (None, 1.0):
        return least
    return max(least, (2, "blend", "the line of `blend` needs"), key=itemgetter(0))


def _of_time(forecast: Forecast, noise: bool) -> Iterator[_Contradiction]:
    if forecast.basis != "reuse" and forecast.time in ("sigma", "log_snr") and not noise:
        message = (
            f"`{forecast.time}` needs `sampler.noise`, which says how it follows from the timestep"
        )
        yield _Contradiction(("time", "basis"), message)
