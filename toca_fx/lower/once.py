"""What is traced when it is first needed, and kept."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, Generic, TypeVar, overload

from toca_fx.lower.locks import new_lock
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


class Replayed(Iterable[Value]):
    """What an iterator gives, each time from the first: it is asked once for each."""

    def __init__(self, values: Iterator[Value]) -> None:
        self._values, self._found = values, list[Value]()

    def __iter__(self) -> Iterator[Value]:
        for at in itertools.count():
            if at == len(self._found):
                try:
                    self._found.append(next(self._values))
                except StopIteration:
                    return
            yield self._found[at]


class Recent(MutableMapping[Key, Value]):
    """A mapping of the ``most`` items that were read last."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, new_lock()
        self._items: OrderedDict[Key, Value] = OrderedDict()

    def __getitem__(self, key: Key) -> Value:
        with self._lock:
            value = self._items[key]
            self._items.move_to_end(key)
            return value

    def __setitem__(self, key: Key, value: Value) -> None:
        with self._lock:
            self._items[key] = value
            while len(self._items) > self._most:
                self._items.popitem(last=False)

    def __delitem__(self, key: Key) -> None:
        with self._lock:
            del self._items[key]

    def __iter__(self) -> Iterator[Key]:
        with self._lock:
            return iter(list(self._items))

    def __len__(self) -> int:
        return len(self._items)


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
