"""A policy as plain data, with a position for every key and value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from toca_fx.diagnostics import Problem, Severity, quote

Path = tuple[str | int, ...]

MAX_DEPTH = 16
MAX_VALUES = 2000
ONE_SCREEN = "a policy fits on one screen"


class Position(NamedTuple):
    """A place in a file; both count from 1."""

    line: int
    column: int


def dotted(path: Path) -> str:
    """A key path as people write it: `rules[0].N.base`; `policy` for the whole."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".") or "policy"


@dataclass
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and where each part of it stands.

    `refused` holds the paths whose value is only a stand-in, because a problem was already reported
    for it. A policy that came as a mapping has no positions; its problems name the key path
    instead.
    """

    file: str
    data: object = None
    keys: dict[Path, Position] = field(default_factory=dict)
    values: dict[Path, Position] = field(default_factory=dict)
    refused: set[Path] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = True

    def position(self, path: Path, *, key: bool = False) -> Position | None:
        """Where the key or the value of a path stands, or what holds it; None without positions."""
        places = (self.keys, self.values) if key else (self.values, self.keys)
        found = places[0].get(path) or places[1].get(path)
        return found if found or not path else self.position(path[:-1])

    def place(self, path: Path) -> str:
        """`file:line:col` of a path, or the key path where there are no positions."""
        position = self.position(path, key=True)
        return f"{self.file}:{position.line}:{position.column}" if position else dotted(path)

    def problem(
        self, path: Path, message: str, severity: Severity = "error", *, key: bool = False
    ) -> Problem:
        """A problem standing at the value of a path, or at its key."""
        position = self.position(path, key=key)
        if position is None:
            return Problem(dotted(path), 0, 0, message, severity)
        return Problem(self.file, position.line, position.column, message, severity)


def from_mapping(mapping: Mapping[str, object]) -> Document:
    """A policy given as Python data: copied to plain dicts and lists, with anything that YAML
    cannot hold refused.
    """
    document = Document("<mapping>")
    document.data = _plain(document, mapping, (), [0])
    return document


def _plain(document: Document, value: object, path: Path, seen: list[int]) -> object:
    seen[0] += 1
    complaint = _complaint(value, len(path), seen[0])
    if complaint:
        document.problems.append(document.problem(path, complaint))
        document.refused.add(path)
        return None
    if isinstance(value, Mapping):
        return {
            str(key): _plain(document, item, (*path, str(key)), seen) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(document, item, (*path, index), seen) for index, item in enumerate(value)]
    return value


def _complaint(value: object, depth: int, seen: int) -> str | None:
    if depth > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} levels deep ({ONE_SCREEN})"
    if seen > MAX_VALUES:
        return f"more than {MAX_VALUES} values ({ONE_SCREEN})"
    if isinstance(value, int) and value.bit_length() > 63:
        return f"{quote(value)} does not fit into 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{quote(value)} is not a finite number"
    if value is None or isinstance(value, (str, int, float, Mapping, list, tuple)):
        return None
    return f"expected plain data, got {quote(value)}"
