"""What of a parametrized test runs every day, and what is left to ``make test-all``."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TypeVar

import pytest

Value = TypeVar("Value")


def slow_but(often: Container[Value], values: Iterable[Value], reason: str) -> list[object]:
    """The ``values`` of a parametrization (tuples where it has several names), those that are not
    in ``often`` marked slow.
    """
    mark = pytest.mark.slow(reason=reason)
    return [
        value
        if value in often
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark)
        for value in values
    ]
