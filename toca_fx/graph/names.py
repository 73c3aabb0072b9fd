"""Operators by name: those of libraries may not be installed, or not be imported yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any

from toca_fx.torch_private import OpOverload


def operator_name(target: object) -> str:
    """The name of an operator without namespace and overload, "linear"; "" if it is none."""
    return str(target.overloadpacket.__name__) if isinstance(target, OpOverload) else ""


def namespace(target: object) -> str:
    """The namespace of an operator, "aten" for those of PyTorch; "" if it is none."""
    return target.namespace if isinstance(target, OpOverload) else ""


def qualified_name(target: object) -> str:
    """The name of an operator without overload, "aten::linear"; "" if it is none."""
    return f"{namespace(target)}::{operator_name(target)}" if namespace(target) else ""


class Members(Set[Any]):
    """Operators of the table. One of a library is a member if its name is: ``"quanto::unpack"``."""

    def __init__(self, keys: Iterable[Any]) -> None:
        self._keys = frozenset(keys)

    def __contains__(self, target: object) -> bool:
        if target in self._keys:
            return True
        return namespace(target) not in ("", "aten") and qualified_name(target) in self._keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
