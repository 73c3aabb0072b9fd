"""Plain data that passed the schema to the dataclasses of a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from toca_fx.policy.interval import Placement
from toca_fx.policy.keys import (
    NUMBER,
    Declared,
    forms_of,
    is_mapping,
    item_type,
    keys_of,
    rule_keys,
    stand_ins,
)
from toca_fx.policy.modules import Action
from toca_fx.policy.types import Policy, Rule

Data = Mapping[str, Any]
P = TypeVar("P", bound=Policy)


def build(data: Data, source: str, place_of_rule: Callable[[int], str], policy: type[P]) -> P:
    """Build a policy; a required part that is missing (and reported elsewhere) gets a harmless
    stand-in.
    """
    rules = data.get("rules", ())
    given = {**stand_ins(policy), **_read_keys(policy, {**data, "rules": ()})}
    if given["N"].full_steps and "base" not in data["N"]:
        # The mean interval is the base that the staleness score divides by.
        mean = _mean_interval(given["N"].full_steps, given["sampler"].steps)
        given["N"] = replace(given["N"], base=mean)
    elif (gate := given.get("gate")) and gate.at_most and "base" not in data.get("N", {}):
        given["N"] = replace(given["N"], base=gate.at_most + 1)
    given["rules"] = tuple(
        _rule(rule, place_of_rule(index), policy) for index, rule in enumerate(rules)
    )
    return policy(**given, source=source)


def _mean_interval(listed: tuple[float, ...] | Placement, steps: int) -> int:
    of, at = (listed.of, listed.at) if isinstance(listed, Placement) else (steps, listed)
    return max(1, round(of / max(1, len(at))))


def _read_keys(declaring: type, data: Data) -> dict[str, Any]:
    """The values of the keys that are given, by field."""
    return {
        declared.field: _read(declared, data[declared.name])
        for declared in keys_of(declaring)
        if declared.name in data
    }


def _read(declared: Declared, value: Any) -> Any:
    if value is None and declared.key.nullable:
        return declared.default
    if declared.key.form:
        return tuple(vars(_read_whole(declared.key.form, value)).items())
    return _read_value(declared.type, value)


def _read_list(item: Any, values: list[Any]) -> tuple[Any, ...]:
    if not is_mapping(item):
        return tuple(_read_value(item, value) for value in values)
    required = {declared.name for declared in keys_of(item) if declared.required}
    complete = (value for value in values if required <= value.keys())
    return tuple(_read_value(item, value) for value in complete)


def _read_value(kind: Any, value: Any) -> Any:
    """A value in the form of its field's type."""
    if kind is Action:
        return _action(value)
    kind = _form_of(kind, value)
    if item_type(kind):
        return _read_list(item_type(kind), value)
    if is_mapping(kind):
        return _read_whole(kind, value)
    # JSON Schema counts 3.0 as an integer and 1 as a number, so types are settled here.
    if kind == NUMBER:
        return int(value) if value == int(value) else value
    return kind(value) if kind in (int, float) else value


def _form_of(kind: Any, value: Any) -> Any:
    """The type, of a union's, that has the form of a value: a list, a mapping or a scalar."""
    forms = forms_of(kind)
    if len(forms) == 1:
        return kind
    form = (isinstance(value, list), isinstance(value, Mapping))
    return next(each for each in forms if (bool(item_type(each)), is_mapping(each)) == form)


def _read_whole(declaring: type[Any], data: Data) -> Any:
    return declaring(**{**stand_ins(declaring), **_read_keys(declaring, data)})


def _action(value: Any) -> Action:
    if isinstance(value, Mapping):
        return Action("partial", **_read_keys(Action, value))
    return Action("compute" if value == "compute" else "reuse")


def _layers(value: str | int) -> tuple[int, int]:
    """`5`, "5" or "0-3" as an inclusive range."""
    first, _, last = str(int(value) if isinstance(value, (int, float)) else value).partition("-")
    return int(first), int(last or first)


def _rule(data: Data, position: str, policy: type[Policy]) -> Rule:
    layers = _layers(data["layers"]) if "layers" in data else None
    overrides = tuple(_overrides(data, policy))
    return Rule(data.get("match"), data.get("path"), layers, overrides, position)


def _overrides(data: Data, policy: type[Policy]) -> Iterator[tuple[str, object]]:
    if "module" in data:
        yield "module", _action(data["module"])
    for field, section in rule_keys(policy).sections.items():
        value = data.get(section.name)
        if value == "off":
            yield field, None
        elif isinstance(value, Mapping):
            read = _read_keys(section.type, value)
            yield from ((f"{field}.{leaf}", item) for leaf, item in read.items())
