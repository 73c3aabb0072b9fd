"""How tensors lie in memory: enough of them to know what an operator returns that was run before.

An operator on operands of equal layout returns tensors of equal layout, which share memory with the
operands in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toca_fx.torch_private import FakeTensor, FakeTensorMode, storage_id, tree_map, tree_map_only

_CONSTANTS = (
    int,
    float,
    bool,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


@dataclass(frozen=True, eq=False)
class Layout:
    """A tensor without numbers: ``meta`` is on the device "meta", and would lie on ``device``."""

    meta: Tensor
    device: torch.device

    @property
    def key(self) -> object:
        """What an operator can see of it: hashable, equal for equal layouts."""
        meta = self.meta
        return meta.shape, meta.stride(), meta.dtype, self.device

    def fake(self, mode: FakeTensorMode) -> Tensor:
        """A fake tensor like it, in memory of its own."""
        with mode:
            return torch.empty_strided(
                self.meta.shape, self.meta.stride(), dtype=self.meta.dtype, device=self.device
            )


@dataclass(frozen=True)
class Result:
    """A tensor that an operator returns, in the memory of operand ``source`` or in new memory.

    ``offset`` counts elements from where the operand begins. New memory, of ``nbytes`` bytes, is
    numbered from -1 downwards.
    """

    source: int
    nbytes: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made(self, operands: Sequence[Layout], new: dict[int, torch.UntypedStorage]) -> Layout:
        """The tensor that is returned for ``operands``; ``new`` keeps the new memory."""
        offset = self.offset
        if self.source >= 0:
            whole = operands[self.source].meta
            storage = whole.untyped_storage()
            offset += whole.storage_offset() * whole.itemsize // self.dtype.itemsize
        else:
            if self.source not in new:
                memory = torch.empty(self.nbytes, dtype=torch.uint8, device="meta")
                new[self.source] = memory.untyped_storage()
            storage = new[self.source]
        meta = torch.empty(0, dtype=self.dtype, device="meta")
        return Layout(meta.set_(storage, offset, self.shape, self.stride), self.device)


def layout_of(value: Any) -> Any:
    """The layout of a tensor; anything else, and tensors of special kinds, as they are."""
    if not _is_plain(value):
        return value
    meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return Layout(meta, value.device)


def key_of(value: Any, operands: list[Layout]) -> object:
    """What tells an argument from others, hashable; None if that cannot be said.

    The layouts in it are appended to ``operands``, in order.
    """
    if isinstance(value, Layout):
        operands.append(value)
        return value.key
    if isinstance(value, (list, tuple)):
        parts = [key_of(item, operands) for item in value]
        return None if None in parts else (type(value), *parts)
    if isinstance(value, dict):
        return key_of([part for item in value.items() for part in item], operands)
    # 1, 1.0 and True are equal, and not the same.
    return (type(value), value) if value is None or isinstance(value, _CONSTANTS) else None


def described(returned: Any, operands: Sequence[Tensor]) -> Any:
    """What an operator ``returned`` for ``operands``, with a ``Result`` for each tensor."""
    sources = {storage_id(operand): at for at, operand in reversed([*enumerate(operands)])}

    def describe(value: Any) -> Any:
        if not _is_plain(value):
            return value
        return Result(
            sources.setdefault(storage_id(value), -1 - len(sources)),
            value.untyped_storage().nbytes(),
            value.storage_offset(),
            value.shape,
            value.stride(),
            value.dtype,
            value.device,
        )

    return tree_map(describe, returned)


def made(returned: Any, operands: Sequence[Layout]) -> Any:
    """What an operator returns for ``operands``, if ``returned`` is what was described."""
    new: dict[int, torch.UntypedStorage] = {}
    return tree_map_only(Result, lambda result: result.made(operands, new), returned)


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter, FakeTensor)
        and value.layout is torch.strided
        and not (value.is_conj() or value.is_neg())
        and all(type(n) is int for n in (*value.shape, *value.stride(), value.storage_offset()))
    )
