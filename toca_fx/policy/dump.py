"""A policy in the form of the file: the inverse of `policy/build.py`."""

from __future__ import annotations

from typing import Any

import yaml

from toca_fx.policy.keys import Declared, is_mapping, keys_of, rule_keys
from toca_fx.policy.modules import Action
from toca_fx.policy.types import VERSION, Policy, Rule


def to_mapping(policy: Policy) -> dict[str, Any]:
    """The policy as `load_policy` takes it, without what is the default."""
    found = {"version": VERSION, **_keys(policy)}
    if policy.gate is not None and policy.gate.at_most is not None:
        found["N"].pop("base", None)  # the gate bounds the interval
    return {name: value for name, value in found.items() if value != {}}


def to_yaml(policy: Policy) -> str:
    """The text of a policy file."""
    return yaml.safe_dump(to_mapping(policy), sort_keys=False, default_flow_style=None, width=100)


def _keys(declaring: Any) -> dict[str, Any]:
    return {
        declared.name: _plain(declared, getattr(declaring, declared.field))
        for declared in keys_of(type(declaring))
        if _counts(declaring, declared)
    }


def _counts(declaring: Any, declared: Declared) -> bool:
    """Whether a key says something: it is not its default, and no neighbour takes its place."""
    by, unless = declared.key.replaced_by, declared.key.required_unless
    if by and getattr(declaring, by) is not None:
        return False
    needed = bool(unless) and getattr(declaring, unless) is None
    return needed or bool(getattr(declaring, declared.field) != declared.default)


def _plain(declared: Declared, value: Any) -> object:
    if declared.key.form:
        actions = dict(declared.default)  # type: ignore[call-overload]
        return {kind: _value(action) for kind, action in value if action != actions[kind]}
    return _value(value)


def _value(value: Any) -> Any:
    if isinstance(value, Action):
        return value.in_file
    if isinstance(value, Rule):
        return _rule(value)
    if isinstance(value, tuple):
        return [_value(item) for item in value]
    return _keys(value) if is_mapping(type(value)) else value


def _rule(rule: Rule) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if rule.match is not None:
        found["match"] = rule.match
    if rule.path is not None:
        found["path"] = rule.path
    if rule.layers is not None:
        first, last = rule.layers
        found["layers"] = first if first == last else f"{first}-{last}"
    keys = rule_keys(Policy)
    for field, value in rule.overrides:
        if field in keys.leaves:
            section = keys.sections[field.partition(".")[0]].name
            found.setdefault(section, {})[keys.leaves[field].name] = _value(value)
        elif field == "module":
            found["module"] = _value(value)
        else:
            found[keys.sections[field].name] = "off"
    return found
