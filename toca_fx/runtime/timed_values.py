"""What was computed of timesteps before: a run with the same ones need not compute it again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from toca_fx.lower.locks import new_lock
from toca_fx.runtime.identity import Seen
from toca_fx.runtime.schedules import Timestep


class TimedValues:
    """The timed values of a program at earlier timesteps, ``most_bytes`` of them at most.

    They hold as long as all else that they depend on is as it was ``seen``; None: nothing was.
    """

    def __init__(self, seen: Seen | None = None, most_bytes: int = 0) -> None:
        self._seen, self._most_bytes = seen, most_bytes
        self._rows: OrderedDict[Timestep, tuple[Tensor, ...]] = OrderedDict()
        self._bytes, self._lock = 0, new_lock()

    def __contains__(self, timestep: Timestep | None) -> bool:
        return timestep in self._rows

    def fit(self, inputs: Sequence[Any]) -> bool:
        """Whether all else is as it was."""
        return self._seen is not None and not self._seen.differ(inputs)

    def get(self, timestep: Timestep | None) -> tuple[Tensor, ...] | None:
        """The values at a timestep, one tensor per dtype; None if they are not known."""
        return None if timestep is None else self._rows.get(timestep)

    def keep(self, timestep: Timestep | None, rows: Sequence[Tensor]) -> None:
        """Keep a copy of values, if the timestep was read; the oldest ones go."""
        if timestep is None:
            return
        size = sum(row.nbytes for row in rows)
        if size > self._most_bytes:
            return
        kept = tuple(row.clone() for row in rows)
        with self._lock:
            self._make_room(size)
            if timestep not in self._rows:
                self._bytes += size
            self._rows[timestep] = kept

    def _make_room(self, size: int) -> None:
        while self._rows and self._bytes + size > self._most_bytes:
            self._bytes -= sum(row.nbytes for row in self._rows.popitem(last=False)[1])
