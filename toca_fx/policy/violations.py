"""Problems that the JSON Schema finds, told in words and with positions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple, cast

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

from toca_fx.diagnostics import Problem, any_of, did_you_mean, nearest, quote
from toca_fx.policy.document import Document, Path
from toca_fx.policy.keys import Schema
from toca_fx.policy.schema import policy_schema

_TYPE_NAMES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


class Finding(NamedTuple):
    """A problem of the data before it has a position.

    `key` asks for the position of the key instead of the value's; `usable` says that the rest of
    the value holds.
    """

    path: Path
    message: str
    key: bool = False
    usable: bool = False


@cache
def _validator(policy: type) -> Draft7Validator:
    return Draft7Validator(policy_schema(policy))


def check_schema(
    document: Document, policy: type
) -> tuple[list[Problem], dict[str, Any], set[Path]]:
    """Problems by the policy's schema; the data without the faulty parts; the faulty paths.

    What is left of the data can be built into a policy, so that its meaning is checked in the same
    run.
    """
    data = document.data
    if not isinstance(data, dict):
        known = () in document.refused
        return ([] if known else [document.problem((), _wrong_top(data))]), {}, {()}
    errors = _validator(policy).iter_errors(data)
    findings = [finding for error in errors for finding in _explain(error)]
    findings = [finding for finding in findings if not _inside(finding.path, document.refused)]
    problems = [
        document.problem(finding.path, finding.message, key=finding.key)
        for finding in _one_per_path(findings)
    ]
    unusable = {finding.path for finding in findings if not finding.usable} | document.refused
    return (
        problems,
        _without(data, unusable),
        {finding.path for finding in findings} | document.refused,
    )


def _wrong_top(data: object) -> str:
    if data is None:
        return "the file is empty; a policy is a mapping that starts with `version: 1`"
    return f"expected a mapping that starts with `version: 1`, got {quote(data)}"


def _inside(path: Path, refused: set[Path]) -> bool:
    return any(path[:length] in refused for length in range(len(path) + 1))


def _one_per_path(findings: Iterable[Finding]) -> list[Finding]:
    """Drop what a wrong type entails (`enum` beside `type`); several problems of keys at one
    mapping all stay.
    """
    kept: dict[tuple[object, ...], Finding] = {}
    for finding in findings:
        kept.setdefault(
            (finding.path, finding.message) if finding.key else (finding.path,), finding
        )
    return list(kept.values())


class _Violation(NamedTuple):
    """One error of jsonschema, typed: the keyword violated, what it demands, its schema, and the
    value that fails.
    """

    keyword: str
    demand: Any
    schema: Schema
    instance: Any
    path: Path
    context: list[ValidationError]


def _explain(error: ValidationError) -> Iterator[Finding]:
    keyword, schema = str(error.validator), dict(cast("Schema", error.schema))
    path = tuple(error.absolute_path)
    violation = _Violation(
        keyword, error.validator_value, schema, error.instance, path, list(error.context or ())
    )
    return _EXPLAIN.get(keyword, _other)(violation)


def _unknown_keys(violation: _Violation) -> Iterator[Finding]:
    known = list(violation.schema["properties"])
    for key in violation.instance:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known here: {', '.join(known)}"
            yield Finding((*violation.path, key), f"unknown key {quote(key)}{hint}", key=True)


def _missing_keys(violation: _Violation) -> Iterator[Finding]:
    known = list(violation.schema.get("properties", violation.demand))
    mistyped = {nearest(key, known) for key in violation.instance if key not in known}
    for key in violation.demand:
        if (
            key not in violation.instance and key not in mistyped
        ):  # a typo is reported as one problem, not two
            yield Finding(violation.path, f"missing required key `{key}`", key=True, usable=True)


def _wrong_type(violation: _Violation) -> Iterator[Finding]:
    yield _unexpected(violation, _type_hint(violation))


def _type_hint(violation: _Violation) -> str:
    numeric = {"integer", "number"} & {*_listed(violation.demand)}
    if (
        numeric
        and isinstance(violation.instance, str)
        and violation.instance.replace(".", "", 1).isdecimal()
    ):
        return "; remove the quotes"
    return ""


def _unexpected(violation: _Violation, hint: str = "") -> Finding:
    expected, given = _expected(violation.schema), quote(violation.instance)
    return Finding(violation.path, f"expected {expected}, got {given}{hint}")


def _expected(schema: Schema) -> str:
    if "title" in schema:
        return str(schema["title"])
    if "enum" in schema:
        return any_of("null" if word is None else word for word in schema["enum"])
    return " or ".join(_TYPE_NAMES[kind] for kind in _listed(schema["type"]))


def _listed(kinds: str | list[str]) -> list[str]:
    return [kinds] if isinstance(kinds, str) else kinds


def _not_listed(violation: _Violation) -> Iterator[Finding]:
    words = filter(None, violation.demand)
    hint = did_you_mean(violation.instance, words) if isinstance(violation.instance, str) else ""
    yield _unexpected(violation, hint)


def _wrong_constant(violation: _Violation) -> Iterator[Finding]:
    version, given = quote(violation.demand), quote(violation.instance)
    yield Finding(violation.path, f"expected {version}, the only version so far, got {given}")


def _out_of_range(violation: _Violation) -> Iterator[Finding]:
    demand = f"must be {describe_range(violation.schema)}"
    yield Finding(violation.path, f"{_name(violation)}{demand}, got {quote(violation.instance)}")


def _name(violation: _Violation) -> str:
    """The key, or nothing for the items of a list."""
    key = violation.path[-1] if violation.path else None
    return f"`{key}` " if isinstance(key, str) else ""


def describe_range(schema: Schema) -> str:
    """`between 0 and 1`, `at least 1`, `greater than -1 and less than 1`; empty without bounds."""
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"between {low} and {high}"
    names = {
        "minimum": "at least",
        "exclusiveMinimum": "greater than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    return " and ".join(f"{name} {schema[key]}" for key, name in names.items() if key in schema)


def _wrong_length(violation: _Violation) -> Iterator[Finding]:
    least = violation.keyword.startswith("min")
    bound, empty = violation.demand, not violation.instance
    message = (
        "must not be empty"
        if least and empty
        else f"must not be {'shorter' if least else 'longer'} than {bound}"
    )
    yield Finding(
        violation.path, _name(violation) + message, usable=isinstance(violation.instance, dict)
    )


def _no_alternative(violation: _Violation) -> Iterator[Finding]:
    """For oneOf and anyOf: explain the alternative of the value's own type, else say what is
    expected.
    """
    alternatives: list[Schema] = violation.demand
    if all(set(alternative) == {"required"} for alternative in alternatives):
        keys = any_of(alternative["required"][0] for alternative in alternatives)
        yield Finding(violation.path, f"needs at least one of {keys}", key=True, usable=True)
        return
    meant = {
        index
        for index, alternative in enumerate(alternatives)
        if _is_meant(alternative, violation.instance)
    }
    within = [inner for inner in violation.context if inner.schema_path[0] in meant]
    if within:
        for inner in within:
            yield from _explain(inner)
        return
    words = [word for alternative in alternatives for word in alternative.get("enum", ())]
    hint = did_you_mean(violation.instance, words) if isinstance(violation.instance, str) else ""
    yield _unexpected(violation, hint)


def _is_meant(alternative: Schema, instance: object) -> bool:
    """Mappings and lists are looked into; a word or a number that fits no alternative is told what
    all of them are.
    """
    kind = alternative.get("type")
    numeric = isinstance(instance, (int, float)) and not isinstance(instance, bool)
    return (
        (kind == "object" and isinstance(instance, dict))
        or (kind == "array" and isinstance(instance, list))
        or (kind == "integer" and numeric)
    )


def _other(violation: _Violation) -> Iterator[Finding]:
    yield _unexpected(violation)


_EXPLAIN: dict[str, Callable[[_Violation], Iterator[Finding]]] = {
    "additionalProperties": _unknown_keys,
    "required": _missing_keys,
    "type": _wrong_type,
    "enum": _not_listed,
    "const": _wrong_constant,
    "oneOf": _no_alternative,
    "anyOf": _no_alternative,
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _out_of_range),
    **dict.fromkeys(
        ("minItems", "maxItems", "minLength", "maxLength", "minProperties"), _wrong_length
    ),
}


def _without(data: dict[str, Any], unusable: set[Path]) -> dict[str, Any]:
    """A copy of the data without the keys that hold something unusable."""
    pruned = copy.deepcopy(data)
    for path in unusable:
        # A list loses no single items, or the positions of those behind it would shift.
        keys = [index for index, part in enumerate(path) if isinstance(part, str)]
        if keys:
            _delete(pruned, path[: keys[-1] + 1])
    return pruned


def _delete(data: Any, path: Path) -> None:
    *holders, key = path
    try:
        for part in holders:
            data = data[part]
        del data[key]
    except (KeyError, IndexError, TypeError):
        return  # gone already, together with what held it
