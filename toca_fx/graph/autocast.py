"""Torch's autocast as a value.

Graphs have its casts in them (``capture/casts.py``), so that they are traced, counted, compiled and
run with autocast ``OFF``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from toca_fx.torch_private import autocast_devices, is_any_autocast_enabled

_DEVICES = tuple(autocast_devices())


@dataclass(frozen=True)
class Autocast:
    """The types of devices on which autocast is on, with the dtype that it casts to."""

    dtypes: tuple[tuple[str, torch.dtype], ...] = ()

    @classmethod
    def now(cls) -> Autocast:
        """The state that this thread is in."""
        if not is_any_autocast_enabled():
            return OFF
        on = filter(torch.is_autocast_enabled, _DEVICES)
        return cls(tuple((device, torch.get_autocast_dtype(device)) for device in on))

    def without(self, device: str) -> Autocast:
        """The same, switched off on one type of device."""
        return Autocast(tuple(each for each in self.dtypes if each[0] != device))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run everything inside in this state; unlike ``torch.autocast``, no tracer sees it."""
        before = Autocast.now()
        if before == self:
            yield
            return
        usual = {device: torch.get_autocast_dtype(device) for device, _ in self.dtypes}
        try:
            self._switch(before)
            yield
        finally:
            before._switch(self)
            for device, dtype in usual.items():
                torch.set_autocast_dtype(device, dtype)

    def _switch(self, before: Autocast) -> None:
        """Go from the state ``before`` to this one."""
        for device, _ in before.dtypes:
            torch.set_autocast_enabled(device, False)
        for device, dtype in self.dtypes:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)


OFF = Autocast()
