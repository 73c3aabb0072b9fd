"""Reading what a device has found out: when that waits for the device, and how not to."""

from __future__ import annotations

import torch
from torch import Tensor


def reading_waits(tensor: Tensor) -> bool:
    """Whether reading ``tensor`` waits until its device has done all that was queued before."""
    return tensor.device.type != "cpu"


class Watch:
    """The values of ``flags``, a boolean tensor [n], at this point of the device's work.

    They are known later on a GPU, at once on a CPU, and never on other devices.
    """

    def __init__(self, flags: Tensor) -> None:
        self._found: Tensor | None = None
        self._done: torch.cuda.Event | None = None
        if flags.device.type == "cuda":
            pinned = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            self._found = pinned.copy_(flags, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(flags.device))
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
