"""Reading what a device has found out: when that waits for the device, and how not to."""

from __future__ import annotations

import torch
from torch import Tensor


def reading_waits(tensor: Tensor) -> bool:
    """Whether reading ``tensor`` waits until its device has done all that was queued before."""
    return tensor.device.type != "cpu"


def _copied(values: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy of what is on a GPU, and the point of its work at which it is there."""
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(values.device))
    return pinned, done


class Later:
    """A number on a device, at this point of the device's work."""

    def __init__(self, value: Tensor) -> None:
        self._found, self._done = value, None
        if value.device.type == "cuda":
            self._found, self._done = _copied(value)

    def read(self) -> float:
        """The number; it waits until the device has come to it, and on a GPU no longer."""
        if self._done is not None:
            self._done.synchronize()
        return float(self._found.item())


class Watch:
    """The values of ``flags``, a boolean tensor [n], at this point of the device's work.

    They are known later on a GPU, at once on a CPU, and never on other devices.
    """

    def __init__(self, flags: Tensor) -> None:
        self._found: Tensor | None = None
        self._done: torch.cuda.Event | None = None
        if flags.device.type == "cuda":
            self._found, self._done = _copied(flags)
        elif flags.device.type == "cpu":
            self._found = flags.clone()

    def seen(self) -> list[bool] | None:
        """The flags; None as long as they are not known."""
        if self._found is None:
            return None
        if self._done is not None and not self._done.query():  # type: ignore[no-untyped-call]
            return None
        found: list[bool] = self._found.tolist()
        return found
