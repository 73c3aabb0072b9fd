"""Which tensors a call is given: the memory of an earlier call, or another."""

from __future__ import annotations

import ctypes
import operator
import weakref
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_VERSION, _VALUE = operator.attrgetter("_version"), operator.attrgetter("value")
_SIZES = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

Agreement = Literal["equal", "same", "rebuilt", "other"]


class Mark:
    """The memory that a tensor had at a call; it does not keep it alive.

    The same means the same storage, offset, shape, strides and dtype, not written to since, so that
    a view made anew counts. An address alone would not do: it is given out again. Writes that torch
    does not count (through ``.data``, numpy or dlpack, and to tensors made in inference mode) are
    not seen.
    """

    __slots__ = ("_layout", "_storage", "_value", "came_again", "version")

    def __init__(self, value: Tensor) -> None:
        self._value = weakref.ref(value)
        self._storage = _storage(value)
        self._layout = _layout(value)
        self.version = version(value)
        self.came_again = False

    def same(self, value: Tensor) -> bool:
        """Whether ``value`` is that memory, as it was."""
        if version(value) != self.version:
            return False
        if self._value() is value:  # its memory may have been replaced, through ``.data``
            return self._storage is None or value.data_ptr() == self._layout[0]
        if self._storage is None or _layout(value) != self._layout:
            return False
        found = _storage(value)
        return found is not None and bool(found.cdata == self._storage.cdata)

    @property
    def gone(self) -> bool:
        """Whether nobody has the memory any more."""
        if self._storage is None:
            return self._value() is None
        return bool(self._storage.expired())


def _storage(value: Tensor) -> Any:
    """A weak reference to the storage; None for tensors that have none of their own."""
    try:
        return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # a subclass that wraps other tensors
        return None


def _layout(value: Tensor) -> tuple[Any, ...]:
    try:
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    except (NotImplementedError, RuntimeError):
        return 0, value.shape, (), value.dtype


def version(value: Tensor) -> int:
    """How often a tensor was written to; 0 for one made in inference mode, which has no count."""
    try:
        return value._version
    except RuntimeError:
        return 0


def marks_of(values: Sequence[Tensor]) -> tuple[Mark, ...]:
    """The marks of the conditions of a call."""
    return tuple(map(Mark, values))


def agreement(marks: Sequence[Mark], values: Sequence[Tensor]) -> Agreement:
    """Whether a call has the conditions that ``marks`` were taken of.

    "equal": all of them, at least one. An input that never came again, and whose memory is gone,
    was rebuilt, and tells nothing: the conditions are the "same" if others are, and if none is they
    were "rebuilt".
    """
    found = [mark.same(value) for mark, value in zip(marks, values, strict=True)]
    if all(found):
        return "equal" if found else "rebuilt"
    rebuilt = (mark.gone and not mark.came_again for mark in marks)
    if not all(same or gone for same, gone in zip(found, rebuilt, strict=True)):
        return "other"
    return "same" if any(found) else "rebuilt"


class Seen:
    """Inputs as they were: weights, of which there are hundreds, and conditions, which may go.

    Nothing is kept alive. Of weights on a CPU one number each is compared too: who fuses a LoRA
    writes through ``.data``, which torch does not count.
    """

    def __init__(self, inputs: Sequence[Any], kept: Sequence[int], state: frozenset[int]) -> None:
        tensors = [at for at in kept if isinstance(inputs[at], Tensor)]
        self._weights_at = [at for at in tensors if at in state]
        self._others_at = [at for at in tensors if at not in state]
        self._numbers_at = [at for at in kept if not isinstance(inputs[at], Tensor)]
        weights = [inputs[at] for at in self._weights_at]
        self._weights = list(map(weakref.ref, weights))
        self._versions, self._addresses = _versions(weights), _addresses(weights)
        self._sampled = [one for one in map(_a_number, weights) if one is not None]
        self._sample = list(map(_VALUE, self._sampled))
        self._marks: tuple[Mark, ...] = marks_of([inputs[at] for at in self._others_at])
        self._numbers = [inputs[at] for at in self._numbers_at]

    def differ(self, inputs: Sequence[Any]) -> bool:
        """Whether inputs are others by now."""
        weights = [inputs[at] for at in self._weights_at]
        if any(ref() is not weight for ref, weight in zip(self._weights, weights, strict=True)):
            return True
        if _versions(weights) != self._versions or _addresses(weights) != self._addresses:
            return True
        # They are where they were: what lies there can be read.
        if list(map(_VALUE, self._sampled)) != self._sample:
            return True
        if [inputs[at] for at in self._numbers_at] != self._numbers:
            return True
        others = [inputs[at] for at in self._others_at]
        return not all(mark.same(value) for mark, value in zip(self._marks, others, strict=True))

    def alike(self, other: Seen) -> bool:
        """Whether both saw the same weights as they are, whatever their order."""
        if len(self._weights) != len(other._weights):
            return False
        found = [
            {id(ref()): version for ref, version in zip(each._weights, each._versions, strict=True)}
            for each in (self, other)
        ]
        return found[0] == found[1]


def fingerprint(weight: Tensor) -> tuple[Any, ...]:
    """What changes when a weight is written to, wherever its memory lies."""
    number = _a_number(weight)
    return version(weight), None if number is None else number.value


def _versions(values: list[Tensor]) -> list[int]:
    try:
        return list(map(_VERSION, values))
    except RuntimeError:  # tensors made in inference mode
        return list(map(version, values))


def _addresses(values: list[Tensor]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, values))
    except (NotImplementedError, RuntimeError):  # subclasses that wrap other tensors
        return []


def _a_number(weight: Tensor) -> Any:
    """One number of a weight where it lies, read by ``_VALUE`` in no time; None if none can be.

    It must not be read any more once the weight has gone.
    """
    size = _SIZES.get(weight.element_size())
    if weight.device.type != "cpu" or type(weight) not in _PLAIN or not weight.numel() or not size:
        return None
    if not weight.data_ptr():  # its memory is elsewhere, and whoever put it there looks at it
        return None
    steps = zip(weight.shape, weight.stride(), strict=True)
    offset = sum(length // 2 * stride for length, stride in steps)
    return size.from_address(weight.data_ptr() + offset * weight.element_size())
