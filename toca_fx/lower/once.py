"""What is traced when it is first needed, and kept."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Generic, TypeVar, overload

from toca_fx.torch_private import compiling

Key = TypeVar("Key")
Value = TypeVar("Value")


def once(found: MutableMapping[Key, Value], key: Key, trace: Callable[[], Value]) -> Value:
    """``found[key]``; if it is missing, one thread traces it, and the others wait for that."""
    value = found.get(key)
    if value is not None:
        return value
    with compiling():
        if key not in found:
            found[key] = trace()
        return found[key]


class traced_once(Generic[Value]):  # noqa: N801 - as functools.cached_property
    """A ``functools.cached_property`` whose value is traced or compiled: see ``compiling``.

    That of Python 3.11 has a lock of its own, which another thread might hold while it waits for
    Dynamo's.
    """

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self._function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> traced_once[Value]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object | None, owner: type) -> traced_once[Value] | Value:
        """The value; later reads find it in the instance and do not come here."""
        if instance is None:
            return self
        found = vars(instance)
        with compiling():
            if self._name not in found:
                found[self._name] = self._function(instance)
            value: Value = found[self._name]
            return value
