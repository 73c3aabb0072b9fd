"""What an unquoted YAML word means, and the words that mean something other than they seem to.

PyYAML follows YAML 1.1, editors and most newer tools follow 1.2. Where the two disagree the word is
refused with the unambiguous spelling instead of being read one way or the other. Source:
https://yaml.org/type/ (1.1) against chapter 10.3 of https://yaml.org/spec/1.2.2/ (1.2).
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

ScalarValue = str | int | float | bool | None

_CONSTANTS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
_SWITCH = re.compile(r"(?:yes|Yes|YES|on|On|ON)|(no|No|NO|off|Off|OFF)")

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?")
_EXPONENT = re.compile(r"([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[eE]([-+]?)([0-9]+)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_OTHER_BASE = re.compile(r"[-+]?0(?:[xX][0-9a-fA-F]+|[bB][01]+|[oO][0-7]+)")
_UNDERSCORE = re.compile(r"[-+]?[0-9][0-9_]*_[0-9_]*(?:\.[0-9_]*)?")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_DIGITS = re.compile(r"[-+]?[0-9][0-9_.:]*")

_LONGEST_NUMBER = 40  # characters; far more digits than a double holds
_LARGEST_INTEGER = 2**63 - 1


class Scalar(NamedTuple):
    """The value of an unquoted word, and a complaint when the word should not be used (the value is
    then a guess).
    """

    value: ScalarValue
    complaint: str | None = None


def read_plain(text: str) -> Scalar:
    """Read an unquoted scalar; quoted ones are always text and do not come here."""
    if text in _CONSTANTS:
        return Scalar(_CONSTANTS[text])
    if len(text) > _LONGEST_NUMBER:
        return _read_long(text)
    if _INTEGER.fullmatch(text):
        return _read_integer(text)
    if _FLOAT.fullmatch(text):
        return _read_float(text)
    return Scalar(text, _trap(text))


def _read_long(text: str) -> Scalar:
    if _DIGITS.fullmatch(text):
        return Scalar(None, f"a number of {len(text)} characters is too long")
    return Scalar(text)


def _read_integer(text: str) -> Scalar:
    value = int(text)
    if abs(value) > _LARGEST_INTEGER:
        return Scalar(None, f"`{text}` does not fit into 64 bits")
    return Scalar(value)


def _read_float(text: str) -> Scalar:
    value = float(text)
    return (
        Scalar(value)
        if math.isfinite(value)
        else Scalar(None, f"`{text}` is too large for a number")
    )


def _trap(text: str) -> str | None:
    shown = f"`{text}`"
    if switch := _SWITCH.fullmatch(text):
        meaning = "false" if switch.group(1) else "true"
        return f'YAML 1.1 reads {shown} as {meaning}: write "{text}" in quotes if the word is meant'
    if exponent := _EXPONENT.fullmatch(text):
        instead = _spell_out(*exponent.groups())
        return f"YAML 1.1 reads {shown} as text, not as a number: write {instead}"
    if _LEADING_ZERO.fullmatch(text):
        return (
            f"YAML 1.1 reads {shown} with its leading zero as octal: write {_without_zeros(text)}"
        )
    if _OTHER_BASE.fullmatch(text):
        return f"{shown} is not a decimal number: write {int(text, 0)}"
    if _UNDERSCORE.fullmatch(text):
        return (
            f"YAML versions disagree about the underscore in {shown}: write {text.replace('_', '')}"
        )
    if _SEXAGESIMAL.fullmatch(text):
        return (
            f"YAML 1.1 reads {shown} as a number to the base 60: put it in quotes, or write the "
            "number in decimal"
        )
    if _NOT_FINITE.fullmatch(text):
        return f"{shown} is not a finite number"
    return None


def _spell_out(mantissa: str, sign: str, exponent: str) -> str:
    full = mantissa if "." in mantissa else f"{mantissa}.0"
    spelled = f"{full}e{sign or '+'}{exponent}"
    decimal = f"{float(spelled):.12f}".rstrip("0").rstrip(".")
    exact = len(decimal) < 16 and float(decimal) == float(spelled)
    return f"{decimal} or {spelled}" if exact else spelled


def _without_zeros(text: str) -> str:
    sign, digits = (text[0], text[1:]) if text[0] in "+-" else ("", text)
    return f"{sign}{digits.replace('_', '').lstrip('0') or '0'}"
