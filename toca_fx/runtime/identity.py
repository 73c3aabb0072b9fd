"""Which tensors a call is given: the memory of an earlier call, or another."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_VERSION = operator.attrgetter("_version")
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

Agreement = Literal["equal", "same", "rebuilt", "other"]


class Mark:
    """The memory that a tensor had at a call; it does not keep it alive.

    The same means the same storage, offset, shape, strides and dtype, not written to since, so that
    a view made anew counts. An address alone would not do: it is given out again. Writes that torch
    does not count (through ``.data``, numpy or dlpack, and to tensors made in inference mode) are
    not seen.
    """

    __slots__ = ("_layout", "_storage", "_value", "version")

    def __init__(self, value: Tensor) -> None:
        self._value = weakref.ref(value)
        self._storage = _storage(value)
        self._layout = _layout(value)
        self.version = version(value)

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

    "equal": all of them, at least one. An input whose former memory is gone was rebuilt, and tells
    nothing: the conditions are the "same" if others are, and if none is they were "rebuilt".
    """
    found = [mark.same(value) for mark, value in zip(marks, values, strict=True)]
    if all(found):
        return "equal" if found else "rebuilt"
    if not all(same or mark.gone for same, mark in zip(found, marks, strict=True)):
        return "other"
    return "same" if any(found) else "rebuilt"


class Seen:
    """Inputs as they were: weights, of which there are hundreds, and conditions, which may go.

    Of weights on a CPU one number each is compared too: who fuses a LoRA writes through ``.data``,
    which torch does not count.
    """

    def __init__(self, inputs: Sequence[Any], kept: Sequence[int], state: frozenset[int]) -> None:
        self._state_at = [at for at in kept if at in state]
        self._others_at = [at for at in kept if at not in state and isinstance(inputs[at], Tensor)]
        self._numbers_at = [at for at in kept if not isinstance(inputs[at], Tensor)]
        self._state = [inputs[at] for at in self._state_at]
        self._versions, self._addresses = _versions(self._state), _addresses(self._state)
        # As long as somebody has it, no other weight gets the memory of one that is replaced.
        self._held = [one.untyped_storage() for one in self._state if type(one) in _PLAIN]
        self._numbers_of = [one for one in map(_a_number, self._state) if one is not None]
        self._sample = [number.item() for number in self._numbers_of]
        self._marks: tuple[Mark, ...] = marks_of([inputs[at] for at in self._others_at])
        self._numbers = [inputs[at] for at in self._numbers_at]

    def differ(self, inputs: Sequence[Any]) -> bool:
        """Whether inputs are others by now."""
        state = [inputs[at] for at in self._state_at]
        if any(map(operator.is_not, state, self._state)):
            return True
        if _versions(state) != self._versions or _addresses(state) != self._addresses:
            return True
        if [number.item() for number in self._numbers_of] != self._sample:
            return True
        if [inputs[at] for at in self._numbers_at] != self._numbers:
            return True
        others = [inputs[at] for at in self._others_at]
        return bool(others) and not all(
            mark.same(value) for mark, value in zip(self._marks, others, strict=True)
        )


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
    """A view of one number of a weight, as numpy's, whose reading is cheap; None if none can be."""
    if weight.device.type != "cpu" or not weight.numel() or type(weight) not in _PLAIN:
        return None
    number = weight.detach()[tuple(size // 2 for size in weight.shape)]
    if weight.element_size() == 2:  # numpy has no bfloat16
        number = number.view(torch.int16)
    try:
        return number.numpy()
    except TypeError:  # nor others
        return None
