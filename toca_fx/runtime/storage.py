"""All that a generation keeps from step to step, always at the same addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toca_fx.lower.cuda_graphs import Recordings
from toca_fx.lower.hoisted_values import HoistedValues
from toca_fx.plan.buffers import Buffer
from toca_fx.runtime.gate import Gate
from toca_fx.runtime.histories import Histories
from toca_fx.runtime.selector import Selector


@dataclass(eq=False)
class Storage:
    """The tensors of a generation, and the recordings made on them.

    Storages of one ``key`` are interchangeable. ``recordings`` is None where steps are queued, and
    ``reason`` says why ("" on a CPU, where nothing is ever recorded). ``mark`` is the end of the
    last generation on it.
    """

    key: tuple[int, int]
    buffers: Mapping[Buffer, Tensor]
    hoisted: HoistedValues
    selector: Selector
    histories: Histories
    gate: Gate | None
    recordings: Recordings | None = None
    reason: str = ""
    mark: Any = None

    def __post_init__(self) -> None:
        self.tensors = {**self.buffers, **self.hoisted.tensors}

    def clear(self) -> None:
        """Begin a generation; what a full step writes before it is read stays."""
        for buffer, tensor in self.buffers.items():
            if not buffer.written_first and buffer.role != "cache":  # the histories have those
                tensor.zero_()
        self.forget_steps()
        self.hoisted.clear()
        self.selector.clear()

    def forget_steps(self) -> None:
        """Read nothing of the steps so far, of which the next ones know by number or by value."""
        self.histories.clear()
        if self.gate is not None:
            self.gate.clear()

    def take_over(self, other: Storage) -> bool:
        """Go on with what ``other`` holds, hoisted values aside; False if it holds other things."""
        ours = [*self.buffers.values(), *self.selector.counters]
        theirs = [*other.buffers.values(), *other.selector.counters]
        pairs = zip(ours, theirs, strict=False)
        alike = all((one.shape, one.dtype) == (two.shape, two.dtype) for one, two in pairs)
        if not alike or self.buffers.keys() != other.buffers.keys() or len(ours) != len(theirs):
            return False
        with torch.inference_mode(False), torch.no_grad():
            for own, given in zip(ours, theirs, strict=True):
                own.copy_(given)
        self.histories.take_over(other.histories)
        self.gate = other.gate
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of caches, scores and counters."""
        return sum(tensor.nbytes for tensor in self.buffers.values()) + self.selector.nbytes()

    @property
    def total_bytes(self) -> int:
        """Bytes of caches, scores, counters and hoisted values."""
        return self.nbytes + self.hoisted.nbytes
