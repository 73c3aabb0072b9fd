"""The JSON Schema of the policy format, made from what the dataclasses declare.

It serves editors (as the file `policy.schema.json`, which `tools/policy_reference.py` writes), the
reference and validation alike: a `title` says what is expected where a type or a list of
alternatives would not ("a layer number or a range such as 0-3").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from typing import Any, Literal, get_args, get_origin

from toca_fx.policy.keys import (
    NUMBER,
    Declared,
    Key,
    Override,
    Schema,
    forms_of,
    is_mapping,
    item_type,
    keys_of,
)
from toca_fx.policy.modules import ACTION_TITLE, Action, Mode
from toca_fx.policy.types import VERSION, Policy, Rule

_TYPES = {int: "integer", float: "number", NUMBER: "number", str: "string"}
_CONSTRAINTS = {
    "minimum": "minimum",
    "maximum": "maximum",
    "exclusive_minimum": "exclusiveMinimum",
    "exclusive_maximum": "exclusiveMaximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "min_items": "minItems",
    "max_items": "maxItems",
}


def policy_schema(policy: type = Policy) -> Schema:
    """The schema of all that a policy declares, in draft 7."""
    keys = keys_of(policy)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://toca-fx.invalid/policy.schema.json",
        "title": f"toca_fx policy, version {VERSION}",
        "description": "How the modules of a diffusion transformer are cached over the sampling "
        "loop. Letters as in the paper: step index s of T steps, layer l, N the interval of full "
        "steps, R the share of stale tokens. On a full step everything is computed; on a partial "
        "step the share (1 - R.base) * step factor * layer factor * module weight, kept between 0 "
        "and 1, of each selecting module's tokens.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "version": {"description": "Version of this format.", "const": VERSION},
            **{declared.name: _property(declared) for declared in keys},
        },
        "required": ["version", *_required(keys)],
        "allOf": [_unless(section) for section in keys if section.key.without_demands],
        "definitions": {
            **{section.name: _definition(section) for section in keys if _is_shared(section)},
            "action": _action(),
            **dict(_items(keys)),
            "rule": _rule(keys),
        },
    }


def _is_shared(declared: Declared) -> bool:
    """Whether a mapping has a definition, because rules take it too."""
    return declared.key.override is not None and not declared.key.form


def _definition(section: Declared) -> Schema:
    return {"title": section.key.title, **_mapping(section.type)}


def _property(declared: Declared) -> Schema:
    schema = {**_said(declared.key), **_value(declared)}
    shown = declared.type is Action or not is_mapping(declared.type)
    if shown and not declared.required and declared.default not in (MISSING, None):
        schema["default"] = _in_file(declared.default)
    if declared.key.required_unless:
        del schema["default"]
    if declared.key.examples:
        schema["examples"] = list(declared.key.examples)
    return schema


def _said(key: Key | Override) -> Schema:
    words = {"description": key.description, "title": key.title}
    return {name: word for name, word in words.items() if word}


def _in_file(value: object) -> object:
    if isinstance(value, Action):
        return value.in_file
    return list(value) if isinstance(value, tuple) else value


def _value(declared: Declared) -> Schema:
    """What is demanded of the value of a key."""
    if declared.key.alternatives:
        return {"oneOf": list(declared.key.alternatives)}
    if len(forms := forms_of(declared.type)) > 1:
        return {"oneOf": [_form(form, declared.key) for form in forms]}
    if declared.type is Action:
        return {"allOf": [_reference("action")]}
    if _is_shared(declared):
        demands = [] if declared.key.without_demands else _demands(keys_of(declared.type))
        return {"allOf": [_reference(declared.name), *demands]}
    return _form(declared.type, declared.key)


def _form(kind: Any, key: Key) -> Schema:
    """What is demanded of a mapping, a list or a scalar."""
    if is_mapping(kind):
        return _whole_mapping(kind)
    if not item_type(kind):
        return _scalar(kind, key)
    items = {"items": _item(item_type(kind), key.items or Key())}
    return {"type": _or_null("array", key), **_constraints(key), **items}


def _item(item: Any, said: Key) -> Schema:
    if is_mapping(item):
        return _reference(_definition_name(item))
    return {**_said(said), **_form(item, said)}


def _scalar(kind: Any, key: Key) -> Schema:
    words = get_args(kind) if get_origin(kind) is Literal else key.choices
    if words:
        null = [None] if key.nullable else []
        return {"type": _or_null("string", key), "enum": [*words, *null]}
    return {"type": _or_null(_TYPES[kind], key), **_constraints(key)}


def _or_null(kind: str, key: Key) -> str | list[str]:
    return [kind, "null"] if key.nullable else kind


def _constraints(key: Key) -> Schema:
    given = {keyword: getattr(key, name) for name, keyword in _CONSTRAINTS.items()}
    return {keyword: bound for keyword, bound in given.items() if bound is not None}


def _reference(definition: str) -> Schema:
    return {"$ref": f"#/definitions/{definition}"}


def _definition_name(item: Any) -> str:
    return str(item.__name__).lower()


def _mapping(declaring: type) -> Schema:
    """Any of the keys that a dataclass declares, and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {declared.name: _property(declared) for declared in keys_of(declaring)},
    }


def _whole_mapping(declaring: type) -> Schema:
    """The keys that a dataclass declares, with those that are required."""
    schema = _mapping(declaring)
    for demand in _demands(keys_of(declaring)):
        schema.update(demand)
    return schema


def _demands(keys: Iterable[Declared]) -> list[Schema]:
    """Which keys have to be there."""
    keys = tuple(keys)
    required = _required(keys)
    return [
        *([{"required": required}] if required else []),
        *(
            _needs_one_of([declared.name, declared.key.required_unless])
            for declared in keys
            if declared.key.required_unless
        ),
    ]


def _unless(declared: Declared) -> Schema:
    """The demands of a section, unless a key of another one is there."""
    section, _, name = declared.key.without_demands.partition(".")
    demands = {"allOf": _demands(keys_of(declared.type))}
    return {
        "if": {"required": [section], "properties": {section: {"required": [name]}}},
        "else": {"properties": {declared.name: demands}},
    }


def _required(keys: Iterable[Declared]) -> list[str]:
    return [declared.name for declared in keys if declared.required]


def _needs_one_of(names: Iterable[str]) -> Schema:
    return {"anyOf": [{"required": [name]} for name in names]}


def _items(keys: Iterable[Declared]) -> Iterator[tuple[str, Schema]]:
    """The definitions of the mappings that lists inside the sections hold."""
    for section in keys:
        for declared in keys_of(section.type) if is_mapping(section.type) else ():
            item = item_type(declared.type)
            if is_mapping(item):
                said = _said(declared.key.items or Key())
                yield _definition_name(item), {**said, **_whole_mapping(item)}


def _action() -> Schema:
    """A mode by its name, or the mapping that stands for "partial"."""
    return {
        "title": ACTION_TITLE,
        "oneOf": [
            {
                "type": "string",
                "enum": [mode for mode in get_args(Mode) if mode != "partial"],
                "description": "`reuse`: the cached output is taken whole. `compute`: computed in "
                "full on every step, never cached.",
            },
            {
                **_whole_mapping(Action),
                "description": "The selected tokens are computed; the others come from the cache.",
            },
        ],
    }


def _rule(keys: Iterable[Declared]) -> Schema:
    """Selectors, and all of the policy that a rule may override."""
    selectors = {declared.name: _property(declared) for declared in keys_of(Rule)}
    overrides = {
        declared.key.override.name or declared.name: _override(declared, declared.key.override)
        for declared in keys
        if declared.key.override
    }
    [rules] = (declared for declared in keys if item_type(declared.type) is Rule)
    return {
        **_said(rules.key.items or Key()),
        "type": "object",
        "additionalProperties": False,
        "properties": {**selectors, **overrides},
        "allOf": [_needs_one_of(selectors), _needs_one_of(overrides)],
    }


def _override(declared: Declared, override: Override) -> Schema:
    title = {"title": override.title or declared.key.title}
    examples = {"examples": list(override.examples)} if override.examples else {}
    return {**_said(override), **title, **_overriding(declared, override), **examples}


def _overriding(declared: Declared, override: Override) -> Schema:
    if declared.key.form:
        return {"allOf": [_reference("action")]}  # one for all modules that the rule matches
    if not override.off:
        return {"allOf": [_reference(declared.name)], "minProperties": 1}
    # Written out, not referred to: what is wrong with a mapping is told by its own alternative.
    keys = {"description": f"Single keys of `{declared.name}`.", **_mapping(declared.type)}
    off = {"type": "string", "enum": ["off"], "description": override.off}
    return {"oneOf": [off, {**keys, "minProperties": 1}]}
