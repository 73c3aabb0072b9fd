"""Rules that can never apply, that later rules replace, or that have no effect.

Which sites a rule will meet is known only once there is a model, so "covers" and "may overlap"
below are decided from the selectors alone, on the careful side: what is reported holds for every
model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from toca_fx.diagnostics import Severity
from toca_fx.policy.document import Path
from toca_fx.policy.types import MODULE_TYPES, Action, Policy, Rule, SitePolicy

_REPLACED_BY_FULL_STEPS = {"N.base", "N.drift", "N.phase", "N.windows"}
_SPATIAL = {"spatial.bonus", "spatial.grid"}
_NO_SCORES = {"scores.queries", "scores.staleness_over"}


class Note(NamedTuple):
    """A problem of a policy's meaning, by key path; `key` asks for the position of the key."""

    path: Path
    message: str
    severity: Severity = "error"
    key: bool = False


def check_rules(policy: Policy, faulty: set[int]) -> Iterator[Note]:
    """Look through the rules, leaving out the `faulty` ones, which were only read in part."""
    rules = {index: rule for index, rule in enumerate(policy.rules) if index not in faulty}
    for index, rule in rules.items():
        later = [other for number, other in rules.items() if number > index]
        earlier = [other for number, other in rules.items() if number < index]
        in_vain = _empty_range(index, rule) or _replaced(index, rule, later)
        if in_vain:
            yield in_vain
        elif _changes_nothing(policy, rule, earlier):
            yield Note(
                ("rules", index), "the rule changes nothing: what it sets holds already", "warning"
            )
        else:
            yield from _without_effect(policy, index, rule, list(rules.values()))


def reads_scores(rule: Rule) -> bool:
    """Whether a rule sets any score."""
    return any(key.startswith("scores.") and key not in _NO_SCORES for key, _ in rule.overrides)


def _empty_range(index: int, rule: Rule) -> Note | None:
    first, last = rule.layers or (0, 0)
    if first <= last:
        return None
    return Note(
        ("rules", index, "layers"),
        f"the range {first}-{last} holds no layer; did you mean {last}-{first}?",
    )


def _leaves(rule: Rule) -> set[str]:
    """The leaf keys that a rule decides."""
    leaves: set[str] = set()
    for key, _ in rule.overrides:
        leaves |= _SPATIAL if key == "spatial" else {key}
    return leaves


def _decides(rule: Rule) -> set[str]:
    """The leaf keys whose earlier values no longer matter once this rule has been applied."""
    return _leaves(rule) | (_REPLACED_BY_FULL_STEPS if "N.full_steps" in _leaves(rule) else set())


def _replaced(index: int, rule: Rule, later: list[Rule]) -> Note | None:
    left, by = _leaves(rule), list[Rule]()
    for other in later:
        if _covers(other, rule) and left & _decides(other):
            left = left - _decides(other)
            by.append(other)
    if left:
        return None
    where = " and ".join(_line(other) for other in by)
    return Note(
        ("rules", index),
        f"the rule has no effect: everything it sets is set again by the later rule {where}",
    )


def _line(rule: Rule) -> str:
    parts = rule.position.rsplit(":", 2)
    return f"on line {parts[1]}" if len(parts) == 3 else rule.position


def _covers(outer: Rule, inner: Rule) -> bool:
    """Whether `outer` is sure to apply wherever `inner` does."""
    if outer.match not in (None, inner.match) or not _path_covers(outer.path, inner.path):
        return False
    if outer.layers is None:
        return True
    return (
        inner.layers is not None
        and outer.layers[0] <= inner.layers[0]
        and inner.layers[1] <= outer.layers[1]
    )


def _path_covers(outer: str | None, inner: str | None) -> bool:
    if outer in (None, "*", inner):
        return True
    # Matching one pattern against the text of the other is sound only while `*` is the one wildcard
    # on both sides: `?` would take the `*` of the other for a single character, and brackets could
    # be cut in half.
    special = set("?[") & {*str(outer), *(inner or "")}
    return inner is not None and not special and fnmatchcase(inner, str(outer))


def _may_overlap(one: Rule, other: Rule) -> bool:
    if None not in (one.match, other.match) and one.match != other.match:
        return False
    if (
        one.layers
        and other.layers
        and (one.layers[1] < other.layers[0] or other.layers[1] < one.layers[0])
    ):
        return False
    literal = not set("*?[") & {*(one.path or "*"), *(other.path or "*")}
    return not literal or one.path == other.path


def _changes_nothing(policy: Policy, rule: Rule, earlier: list[Rule]) -> bool:
    touched = {key for other in earlier if _may_overlap(other, rule) for key in _decides(other)}
    if touched & _leaves(rule):
        return False
    sites = [_before_rules(policy, kind) for kind in _kinds(rule)]
    return all(rule.apply(site) == site for site in sites)


def _kinds(rule: Rule) -> tuple[str, ...]:
    return (rule.match,) if rule.match else MODULE_TYPES


def _before_rules(policy: Policy, kind: str) -> SitePolicy:
    return SitePolicy(
        policy.N, policy.R, dict(policy.modules)[kind], policy.scores, policy.spatial, policy.cache
    )


def _modes(policy: Policy, rule: Rule, rules: list[Rule]) -> set[str]:
    """What may happen on a partial step to the modules that a rule matches, all rules applied."""
    modes: set[str] = set()
    for kind in _kinds(rule):
        here = replace(rule, match=kind)
        possible = {dict(policy.modules)[kind].mode}
        for other in rules:
            action = dict(other.overrides).get("module")
            if isinstance(action, Action) and _may_overlap(other, here):
                possible = {action.mode} if _covers(other, here) else possible | {action.mode}
        modes |= possible
    return modes


def _without_effect(policy: Policy, index: int, rule: Rule, rules: list[Rule]) -> Iterator[Note]:
    modes = _modes(policy, rule, rules)
    sections = dict.fromkeys(key.partition(".")[0] for key, _ in rule.overrides)
    for section in sections:
        path = ("rules", index, section)
        if section in ("R", "scores", "spatial") and "partial" not in modes:
            fate = "reused whole" if modes == {"reuse"} else "reused whole or computed in full"
            fate = "computed in full" if modes == {"compute"} else fate
            yield Note(
                path,
                f"`{section}` has no effect: the modules that this rule matches are {fate}",
                "warning",
                key=True,
            )
        if section in ("N", "cache") and modes == {"compute"}:
            message = f"`{section}` has no effect: the modules that this rule matches are computed on every step"
            yield Note(path, message, "warning", key=True)
    leaves = _leaves(rule)
    if policy.N.full_steps is not None and "N.full_steps" not in leaves:
        for leaf in sorted(leaves & _REPLACED_BY_FULL_STEPS):
            name = leaf.partition(".")[2]
            message = f"`{name}` has no effect: the policy's `N.full_steps` takes its place"
            yield Note(("rules", index, "N", name), message, "warning", key=True)
    has_bonus = policy.spatial is not None or any(
        "spatial.bonus" in dict(other.overrides) and _may_overlap(other, rule) for other in rules
    )
    if "spatial.grid" in dict(rule.overrides) and not has_bonus:
        yield Note(
            ("rules", index, "spatial"),
            "a `grid` without a `bonus` has no effect",
            "warning",
            key=True,
        )
