"""How a key of the policy format is declared: once, in the metadata of a dataclass field.

    base: int = field(default=3, metadata=key("Interval of full steps.", minimum=1, examples=(3,)))

Everything else comes from such fields: the JSON Schema (`policy/schema.py`) and with it validation,
what editors show and the reference; the building of the dataclasses from plain data
(`policy/build.py`); and what the checks know of single keys (`policy/check.py`,
`policy/rules.py`). A field without such metadata is no key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeGuard, Union, get_args, get_origin, get_type_hints

Schema = dict[str, Any]

NUMBER: Any = int | float

_P = ParamSpec("_P")


@dataclass(frozen=True)
class Override:
    """How a rule may override a key of the policy.

    `name` and `title` are those in the rule, unless they are the key's own; `off` describes the
    word "off", where it can switch the key off; `modes` are the modes of Action with which the
    override has an effect.
    """

    description: str
    name: str = ""
    title: str = ""
    off: str = ""
    examples: tuple[object, ...] = ()
    modes: tuple[str, ...] = ("reuse", "compute", "partial")


@dataclass(frozen=True)
class Score:
    """A token score, by the moment from which its value is ``known``.

    full      a step that computes the attention of ``source``, a full step usually, has run
    ahead     before a partial step starts, from what a generation keeps
    inside    the cross-attention of ``source`` has run; on the same step, perhaps

    ``source`` says which attention the score is made of: the one that tells how much the tokens
    matter ("influence"), or the cross-attention of their block ("entropy").
    """

    known: Literal["full", "ahead", "inside"]
    source: Literal["influence", "entropy"] | None = None

    def __post_init__(self) -> None:
        possible = {"full": "influence", "ahead": None, "inside": "entropy"}
        if self.source != possible[self.known]:
            raise TypeError(
                f"Score({self.known!r}, {self.source!r}): a score that is known {self.known} has "
                f"the source {possible[self.known]!r}"
            )


@dataclass(frozen=True)
class Key:
    """What the format says of a key, or of the items of a list; values in the form of the file.

    The description is Markdown, for editors and the reference. The constraints are those of JSON
    Schema; the type, the default and whether the key is required are the field's own.
    """

    description: str = ""
    name: str = ""  # in the file, where it cannot be the field's
    title: str = ""  # what is expected, where the type does not say it well
    examples: tuple[object, ...] = ()

    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: float | None = None
    exclusive_maximum: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    min_items: int | None = None
    max_items: int | None = None
    choices: tuple[str, ...] = ()  # for text; a Literal brings its own
    alternatives: tuple[Schema, ...] = ()  # instead of the schema of the field's type
    items: Key | None = None
    form: type | None = None  # the dataclass of the mapping in the file, if the field's is another
    nullable: bool = False  # null stands for the default

    required: bool = False  # though the field has a default
    required_unless: str = ""  # the neighbour that does instead of this key
    without_demands: str = ""  # of a section: the key of another with which none here is required
    stand_in: object = None  # for a required key that is missing, while problems are collected
    replaced_by: str = ""  # the neighbour that takes the place of this key
    serves: str = ""  # the neighbour without which this key has no effect
    bases: tuple[str, ...] = ()  # of a forecast: those that heed this key, if not all do
    score: Score | None = None  # of which it is the weight
    override: Override | None = None


@dataclass(frozen=True)
class Declared:
    """A key together with what its field says.

    `name` is its name in the file, `field` the dataclass's, `type` the field's without None (or the
    key's `form`; see `forms_of` for a union), `default` MISSING where there is none.
    """

    name: str
    field: str
    type: Any
    optional: bool
    default: object
    key: Key

    @property
    def required(self) -> bool:
        """Whether the key has to be given."""
        return self.key.required or (self.default is MISSING and not self.optional)


def _as_metadata(make: Callable[_P, Key]) -> Callable[_P, dict[str, Key]]:
    def metadata(*args: _P.args, **kwargs: _P.kwargs) -> dict[str, Key]:
        return {"key": make(*args, **kwargs)}

    return metadata


key = _as_metadata(Key)
"""A Key in the form of a field's `metadata`; takes the same arguments."""


def keys_of(declaring: type) -> tuple[Declared, ...]:
    """The keys that a dataclass declares, in the order of its fields."""
    return _keys_of(declaring)


@cache
def _keys_of(declaring: type) -> tuple[Declared, ...]:
    hints = get_type_hints(declaring)
    return tuple(
        _declared(field.name, hints[field.name], field.default, field.metadata["key"])
        for field in fields(declaring)
        if "key" in field.metadata
    )


def _declared(name: str, hint: Any, default: object, said: Key) -> Declared:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = reduce(or_, (part for part in parts if part is not NoneType))
    return Declared(said.name or name, name, said.form or plain, NoneType in parts, default, said)


@dataclass(frozen=True)
class RuleKeys:
    """What rules can override key by key; a leaf is a dotted field such as "R.base".

    `members` holds the leaves of a section, `replaced` those whose place a leaf takes.
    """

    sections: Mapping[str, Declared]
    leaves: Mapping[str, Declared]
    members: Mapping[str, frozenset[str]]
    replaced: Mapping[str, frozenset[str]]


def rule_keys(policy: type) -> RuleKeys:
    """What rules can override in a policy, in the order of the format."""
    return _rule_keys(policy)


@cache
def _rule_keys(policy: type) -> RuleKeys:
    sections = {
        declared.field: declared
        for declared in keys_of(policy)
        if declared.key.override and not declared.key.form
    }
    leaves, members = dict[str, Declared](), dict[str, frozenset[str]]()
    replaced: dict[str, frozenset[str]] = {}
    for name, section in sections.items():
        own = {f"{name}.{leaf.field}": leaf for leaf in keys_of(section.type)}
        members[name] = frozenset(own)
        leaves.update(own)
        for dotted, leaf in own.items():
            if leaf.key.replaced_by:
                by = f"{name}.{leaf.key.replaced_by}"
                replaced[by] = replaced.get(by, frozenset()) | {dotted}
    return RuleKeys(sections, leaves, members, replaced)


def stand_ins(declaring: type) -> dict[str, Any]:
    """Harmless values for the required keys of a dataclass, by field."""
    return {
        declared.field: declared.type(**stand_ins(declared.type))
        if is_mapping(declared.type)
        else declared.key.stand_in
        for declared in keys_of(declaring)
        if declared.default is MISSING and not declared.optional
    }


def is_mapping(kind: Any) -> TypeGuard[type[Any]]:
    """Whether a type declares keys of its own."""
    return is_dataclass(kind) and bool(keys_of(kind))  # type: ignore[arg-type]


def item_type(kind: Any) -> Any:
    """The type of the items of a list, of any length; None for anything else."""
    arguments = get_args(kind)
    is_list = get_origin(kind) is tuple and arguments[-1] is Ellipsis
    return arguments[0] if is_list else None


def forms_of(kind: Any) -> tuple[Any, ...]:
    """The types of a union, of which a value in the file has one form each; or the type itself.

    `int | float` is one form: a number that stays whole where it is written so.
    """
    union = get_origin(kind) in (Union, UnionType) and kind != NUMBER
    return get_args(kind) if union else (kind,)
