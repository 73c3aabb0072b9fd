"""Rules that can never apply, that later rules replace, or that have no effect.

Which sites a rule will meet is known only once there is a model, so "covers" and "may overlap"
below are decided from the selectors alone, on the careful side: what is reported holds for every
model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from toca_fx.diagnostics import Severity
from toca_fx.policy.document import Path
from toca_fx.policy.keys import RuleKeys, rule_keys
from toca_fx.policy.modules import MODULE_TYPES, Action
from toca_fx.policy.types import Policy, Rule, SitePolicy


class Note(NamedTuple):
    """A problem of a policy's meaning, by key path; `key` asks for the position of the key."""

    path: Path
    message: str
    severity: Severity = "error"
    key: bool = False


def check_rules(policy: Policy, faulty: set[int]) -> Iterator[Note]:
    """Look through the rules, leaving out the `faulty` ones, which were only read in part."""
    keys = rule_keys(type(policy))
    rules = {index: rule for index, rule in enumerate(policy.rules) if index not in faulty}
    for index, rule in rules.items():
        later = [other for number, other in rules.items() if number > index]
        earlier = [other for number, other in rules.items() if number < index]
        in_vain = _empty_range(index, rule) or _replaced(index, rule, later, keys)
        if in_vain:
            yield in_vain
        elif _changes_nothing(policy, rule, earlier, keys):
            yield Note(
                ("rules", index), "the rule changes nothing: what it sets holds already", "warning"
            )
        else:
            yield from _sections_without_effect(policy, index, rule, list(rules.values()))
            yield from _leaves_without_effect(policy, index, rule, list(rules.values()))


def sets_weight(rule: Rule, keys: RuleKeys) -> bool:
    """Whether a rule sets the weight of a score."""
    return any(leaf in keys.leaves and keys.leaves[leaf].key.score for leaf, _ in rule.overrides)


def _empty_range(index: int, rule: Rule) -> Note | None:
    first, last = rule.layers or (0, 0)
    if first <= last:
        return None
    return Note(
        ("rules", index, "layers"),
        f"the range {first}-{last} holds no layer; did you mean {last}-{first}?",
    )


def _leaves(rule: Rule, keys: RuleKeys) -> set[str]:
    """The leaves that a rule decides: all of a section that it switches off."""
    decided = (keys.members.get(name, {name}) for name, _ in rule.overrides)
    return set[str]().union(*decided)


def _decides(rule: Rule, keys: RuleKeys) -> set[str]:
    """The leaves whose earlier values no longer matter once this rule has been applied."""
    leaves = _leaves(rule, keys)
    return leaves.union(*(keys.replaced.get(leaf, ()) for leaf in leaves))


def _replaced(index: int, rule: Rule, later: list[Rule], keys: RuleKeys) -> Note | None:
    left, by = _leaves(rule, keys), list[Rule]()
    for other in later:
        if covers(other, rule) and left & _decides(other, keys):
            left = left - _decides(other, keys)
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


def covers(outer: Rule, inner: Rule) -> bool:
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


def may_overlap(one: Rule, other: Rule) -> bool:
    """Whether two rules may apply to the same site."""
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


def own(rule: Rule, section: str) -> dict[str, Any]:
    """What a rule says of a section, by field."""
    dotted = ((*key.partition("."), value) for key, value in rule.overrides)
    return {leaf: value for name, _, leaf, value in dotted if name == section}


def settled(policy: Policy, rule: Rule, section: str) -> Any:
    """A section as it is for all modules that a rule matches; None if other rules change it for
    some of them.
    """
    found = getattr(policy, section)
    for other in policy.rules:
        changes = own(other, section)
        if changes and may_overlap(other, rule):
            if not covers(other, rule):
                return None
            found = replace(found, **changes)
    return found


def _changes_nothing(policy: Policy, rule: Rule, earlier: list[Rule], keys: RuleKeys) -> bool:
    touched = {
        key for other in earlier if may_overlap(other, rule) for key in _decides(other, keys)
    }
    if touched & _leaves(rule, keys):
        return False
    sites = [_before_rules(policy, kind) for kind in _kinds(rule)]
    return all(rule.apply(site) == site for site in sites)


def _kinds(rule: Rule) -> tuple[str, ...]:
    return (rule.match,) if rule.match else MODULE_TYPES


def _before_rules(policy: Policy, kind: str) -> SitePolicy:
    return SitePolicy(
        policy.N,
        policy.R,
        dict(policy.modules)[kind],
        policy.scores,
        policy.spatial,
        policy.cache,
        policy.forecast,
    )


def _modes(policy: Policy, rule: Rule, rules: list[Rule]) -> set[str]:
    """What may happen on a partial step to the modules that a rule matches, all rules applied."""
    modes: set[str] = set()
    for kind in _kinds(rule):
        here = replace(rule, match=kind)
        possible = {dict(policy.modules)[kind].mode}
        for other in rules:
            action = dict(other.overrides).get("module")
            if isinstance(action, Action) and may_overlap(other, here):
                possible = {action.mode} if covers(other, here) else possible | {action.mode}
        modes |= possible
    return modes


def _sections_without_effect(
    policy: Policy, index: int, rule: Rule, rules: list[Rule]
) -> Iterator[Note]:
    modes = _modes(policy, rule, rules)
    sections = rule_keys(type(policy)).sections
    for field in dict.fromkeys(key.partition(".")[0] for key, _ in rule.overrides):
        override = sections[field].key.override if field in sections else None
        if override and not modes & {*override.modes}:
            name = sections[field].name
            fate = _fate(modes, override.modes)
            message = f"`{name}` has no effect: the modules that this rule matches are {fate}"
            yield Note(("rules", index, name), message, "warning", key=True)


def _fate(modes: set[str], needed: tuple[str, ...]) -> str:
    """What happens to modules instead of what an override needs."""
    if modes != {"compute"}:
        return "reused whole" if modes == {"reuse"} else "reused whole or computed in full"
    return "computed on every step" if "reuse" in needed else "computed in full"


def _leaves_without_effect(
    policy: Policy, index: int, rule: Rule, rules: list[Rule]
) -> Iterator[Note]:
    keys = rule_keys(type(policy))
    leaves = _leaves(rule, keys)
    for by, replaced in keys.replaced.items():
        section, _, name = by.partition(".")
        if by in leaves or getattr(getattr(policy, section), name) is None:
            continue
        for leaf in sorted(leaves & replaced):
            name = keys.leaves[leaf].name
            message = f"`{name}` has no effect: the policy's `{by}` takes its place"
            yield Note(("rules", index, section, name), message, "warning", key=True)
    for leaf, _ in rule.overrides:
        section, declared = leaf.partition(".")[0], keys.leaves.get(leaf)
        served = declared.key.serves if declared else ""
        if declared and served and not _may_be_set(policy, f"{section}.{served}", rule, rules):
            message = f"a `{declared.name}` without a `{served}` has no effect"
            yield Note(("rules", index, section), message, "warning", key=True)


def _may_be_set(policy: Policy, leaf: str, rule: Rule, rules: list[Rule]) -> bool:
    """Whether a leaf has a value where a rule applies; only a section that is off has none."""
    return getattr(policy, leaf.partition(".")[0]) is not None or any(
        leaf in dict(other.overrides) and may_overlap(other, rule) for other in rules
    )
