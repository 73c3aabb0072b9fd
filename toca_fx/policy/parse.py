"""YAML text to plain data with a position for every key and value; every problem of YAML itself is
found here.

The parser's events are consumed one by one instead of calling `yaml.load`: duplicate keys stay
visible, nothing is ever constructed from a tag, and hostile files (deep nesting, anchor bombs) are
given up on before they cost anything.
"""

from __future__ import annotations

import os
import stat

import yaml

from toca_fx.diagnostics import Problem, UnreadablePolicyError, quote
from toca_fx.policy.document import MAX_DEPTH, MAX_VALUES, ONE_SCREEN, Document, Path, Position
from toca_fx.policy.scalar import read_plain

MAX_BYTES = 128 * 1024


def read_text(file: str | os.PathLike[str]) -> str:
    """The text of a policy file.

    Raises UnreadablePolicyError for what is missing, not a regular file, not permitted, not UTF-8
    or over 128 KiB.
    """
    name = os.fspath(file)
    try:
        # Looking first: opening a named pipe would block, and a device need not end.
        mode = os.stat(name).st_mode
        if stat.S_ISDIR(mode):
            raise _unreadable(name, "is a directory")
        if not stat.S_ISREG(mode):
            raise _unreadable(name, "is not a regular file")
        with open(name, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (
        OSError,
        ValueError,
    ) as error:  # ValueError: a NUL in the name; PolicyError is one as well
        if isinstance(error, UnreadablePolicyError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _unreadable(name, reason[:1].lower() + reason[1:]) from error
    return _decode(name, content)


def _unreadable(name: str, reason: str) -> UnreadablePolicyError:
    return UnreadablePolicyError([Problem(name, 0, 0, f"cannot be read: {reason}")])


def _decode(name: str, content: bytes) -> str:
    if len(content) > MAX_BYTES:
        raise _unreadable(name, f"larger than {MAX_BYTES // 1024} KiB ({ONE_SCREEN})")
    if b"\0" in content:
        raise _unreadable(name, "binary data, not UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(name, f"not UTF-8 text (byte {error.start})") from error


def parse_text(text: str, file: str) -> Document:
    """Parse YAML; never raises on account of the text. `complete` is False when parsing had to stop
    early.
    """
    return _Composer(text, file).document


class _StopParsingError(Exception):
    """The rest of the file is not worth reading; the problem has been recorded."""


class _Composer:
    """Builds one Document from PyYAML's events."""

    def __init__(self, text: str, file: str) -> None:
        self.document = Document(file)
        self._count = 0
        self._aliases: set[object] = set()
        self._last = Position(1, 1)
        self._ahead: yaml.Event | None = None
        self._events = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        try:
            self._compose_stream()
        except _StopParsingError:
            self.document.complete = False
        except yaml.reader.ReaderError as error:
            self._stop_at_character(text, error)
        except yaml.MarkedYAMLError as error:
            self._stop_at_syntax(text, error)
        except (ValueError, OverflowError):  # PyYAML on `"\UFFFFFFFF"` and on absurd %YAML versions
            self._stop(
                self._last, "not valid YAML: a number or escape sequence out of range follows here"
            )

    def _stop(self, position: Position, message: str) -> None:
        self._report(position, message)
        self.document.complete = False

    def _stop_at_character(self, text: str, error: yaml.reader.ReaderError) -> None:
        before = text[: error.position]
        position = Position(before.count("\n") + 1, len(before) - before.rfind("\n"))
        self._stop(
            position,
            f"not valid YAML: the character {text[error.position]!a} is not allowed in text",
        )

    def _stop_at_syntax(self, text: str, error: yaml.MarkedYAMLError) -> None:
        mark = error.problem_mark or error.context_mark
        position = Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)
        if mark and text[mark.index : mark.index + 1] == "\t":
            self._stop(position, "not valid YAML: a tab cannot indent or start a value; use spaces")
            return
        opened = f" that starts on line {error.context_mark.line + 1}" if error.context_mark else ""
        context = f" ({error.context}{opened})" if error.context else ""
        self._stop(
            position,
            f"not valid YAML: {error.problem or 'syntax error'}{context}".replace("\t", " "),
        )

    def _report(self, position: Position, message: str) -> None:
        self.document.problems.append(
            Problem(self.document.file, position.line, position.column, message)
        )

    def _peek(self) -> yaml.Event:
        if self._ahead is None:
            self._ahead = next(self._events)
        return self._ahead

    def _next(self) -> yaml.Event:
        event, self._ahead = self._peek(), None
        self._last = _position(event)
        return event

    def _compose_stream(self) -> None:
        self._next()  # the start of the stream
        if isinstance(self._peek(), yaml.StreamEndEvent):
            self.document.values[()] = Position(1, 1)
            return
        self._next()  # the start of the document
        self.document.data = self._compose((), 0)
        self._next()  # the end of the document
        if not isinstance(self._peek(), yaml.StreamEndEvent):
            self._report(
                _position(self._peek()),
                "a second document starts here; a policy file holds exactly one",
            )

    def _compose(self, path: Path, depth: int) -> object:
        event = self._next()
        position = self.document.values[path] = _position(event)
        self._bound(position, depth)
        self._check_node(event, path, position)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._compose_sequence(path, depth)
        if isinstance(event, yaml.MappingStartEvent):
            return self._compose_mapping(path, depth)
        return (
            self._compose_scalar(event, path, position)
            if isinstance(event, yaml.ScalarEvent)
            else None
        )

    def _bound(self, position: Position, depth: int) -> None:
        self._count += 1
        if depth > MAX_DEPTH:
            self._report(position, f"nested more than {MAX_DEPTH} levels deep ({ONE_SCREEN})")
            raise _StopParsingError
        if self._count > MAX_VALUES:
            self._report(position, f"more than {MAX_VALUES} values ({ONE_SCREEN})")
            raise _StopParsingError

    def _check_node(self, event: yaml.Event, path: Path, position: Position) -> None:
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor not in self._aliases:  # once each: a bomb is made of thousands
                self._report(
                    position,
                    f"the alias {quote('*' + str(anchor))} is not supported: write the value out",
                )
            self._aliases.add(anchor)
            self.document.refused.add(path)
        elif anchor is not None:
            self._report(
                position,
                f"the anchor {quote('&' + str(anchor))} is not supported: "
                "write each value where it is used",
            )
        if tag is not None:
            self._report(position, f"the tag {quote(tag)} is refused: a policy is plain data")
            if isinstance(event, yaml.ScalarEvent):
                self.document.refused.add(path)

    def _compose_scalar(self, event: yaml.ScalarEvent, path: Path, position: Position) -> object:
        if not event.implicit[0]:
            return event.value
        value, complaint = read_plain(event.value)
        if complaint:
            self._report(position, complaint)
            self.document.refused.add(path)
        return value

    def _compose_sequence(self, path: Path, depth: int) -> list[object]:
        items: list[object] = []
        while not isinstance(self._peek(), yaml.SequenceEndEvent):
            items.append(self._compose((*path, len(items)), depth + 1))
        self._next()
        return items

    def _compose_mapping(self, path: Path, depth: int) -> dict[str, object]:
        mapping: dict[str, object] = {}
        while not isinstance(self._peek(), yaml.MappingEndEvent):
            position = _position(self._peek())
            key = self._compose_key(path, depth)
            if key is None:
                self._compose((*path, "?"), depth + 1)  # still looked through for problems
                continue
            here = (*path, key)
            if key in mapping:
                first = self.document.keys[here]
                self._report(
                    position, f"duplicate key {quote(key)}: it already stands on line {first.line}"
                )
            self.document.keys[here] = position
            mapping[key] = self._compose(here, depth + 1)
        self._next()
        return mapping

    def _compose_key(self, path: Path, depth: int) -> str | None:
        """The next key; None when it was refused (and reported)."""
        event = self._peek()
        position = _position(event)
        if isinstance(event, yaml.ScalarEvent):
            self._next()
            self._check_node(event, (*path, "?"), position)
            return self._read_key(event, position)
        if not isinstance(event, yaml.AliasEvent):
            self._report(position, "a key must be a word, not a list or a mapping")
        self._compose((*path, "?"), depth + 1)
        return None

    def _read_key(self, event: yaml.ScalarEvent, position: Position) -> str | None:
        plain = bool(event.implicit[0])
        if plain and event.value == "<<":
            self._report(position, "the merge key `<<` is not supported: write the keys out")
            return None
        value, complaint = read_plain(event.value) if plain else (event.value, None)
        if isinstance(value, str) and complaint is None:
            return value
        self._report(position, complaint or f"a key must be a word, not {quote(value)}")
        return None


def _position(event: yaml.Event) -> Position:
    mark = event.start_mark
    return Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)
