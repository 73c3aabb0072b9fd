"""Problems with a position, and how values and names are quoted in messages."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

_LONGEST_QUOTE = 40  # characters; a message stays on one line whatever the file holds
_LONGEST_NAME = 100  # characters; nobody mistypes a known word into something longer


@dataclass(frozen=True)
class Problem:
    """Something wrong in a policy.

    `line` and `column` count from 1. A line of 0 means that there is no position inside `file`: the
    file could not be read, or the policy was a mapping and `file` holds a key path such as
    `R.base`.
    """

    file: str
    line: int
    column: int
    message: str
    severity: Severity = "error"

    @classmethod
    def at(cls, position: str, message: str, severity: Severity = "error") -> Problem:
        """A problem at a `position`: `file:line:col` (as in `Rule`), a file or a key path."""
        found = re.fullmatch(r"(.+):([0-9]+):([0-9]+)", position, re.DOTALL)
        if found is None:
            return cls(position, 0, 0, message, severity)
        file, line, column = found.groups()
        return cls(file, int(line), int(column), message, severity)

    def __str__(self) -> str:
        position = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        prefix = "warning: " if self.severity == "warning" else ""
        return f"{position}: {prefix}{self.message}"


class PolicyError(ValueError):
    """A policy that cannot be used; `problems` holds everything found, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class UnreadablePolicyError(PolicyError):
    """A policy file that cannot be read as text at all: missing, a directory, binary, too large."""


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` is most likely a typo of, or None when none is close."""
    if len(word) > _LONGEST_NAME:
        return None
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """The text to append to a message about an unknown word; empty when nothing is close."""
    close = nearest(word, candidates)
    return f"; did you mean `{close}`?" if close else ""


def quote(value: object) -> str:
    """A value as it is shown in messages: short, printable and on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # Python does not print the largest ones
    if isinstance(value, str) and value.replace(".", "", 1).isdecimal():
        return f'`"{_shorten(value)}"`'  # without quotes it would look like a number
    if isinstance(value, (str, int, float)):
        return f"`{_shorten(value)}`"
    return f"a {type(value).__name__}"


def _shorten(value: str | float) -> str:
    # repr() escapes line breaks, control characters and lone surrogates, none of which a terminal
    # should receive.
    text = repr(value[: _LONGEST_QUOTE + 1])[1:-1] if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."


def any_of(words: Iterable[str]) -> str:
    """The words in a sentence: `a`, `b` or `c`."""
    quoted = [f"`{word}`" for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 error`, `2 errors`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class UnsupportedModelError(RuntimeError):
    """A model with something that cannot be captured or followed.

    The message says what it is, where, and what to do.
    """


MOST_STEPS = 10_000  # model calls of one run


def number_of_steps(value: object, where: str) -> int | None:
    """A number of model calls that a user typed at ``where``; numpy's integers count too.

    Raises:
        ValueError: it is no positive integer, or a number that no sampling run has.
    """
    if value is None:
        return None
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if not 0 < number <= MOST_STEPS:
        raise ValueError(
            f"{where}(num_steps={value!r}): expected a positive integer, the number of model "
            f"calls ({MOST_STEPS} at most)"
        )
    return number
