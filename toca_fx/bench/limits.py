"""What the machine can do at most, measured: products of matrices per second, and bytes moved per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A layer of a transformer in the size of DiT-XL/2: compute-bound, and as large as those that are timed.
_ROWS, _WIDTH = 2048, 1152
_MOVED_BYTES = 2**28
_REPEATS = 20


@dataclass(frozen=True)
class Limits:
    """FLOPs per second of a linear layer, and bytes per second of reading one tensor and writing another."""

    flops: float
    bytes: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for so much work, if moving and computing overlap fully (the roofline)."""
        return max(flops / self.flops, nbytes / self.bytes)


@torch.no_grad()
def measure_limits(place: Mapping[str, Any]) -> Limits:
    """Measure on a ``place`` of device and dtype, with the threads that are set."""
    x, weight = torch.randn(_ROWS, _WIDTH, **place), torch.randn(4 * _WIDTH, _WIDTH, **place)
    linear = _seconds(lambda: torch.nn.functional.linear(x, weight))
    source = torch.ones(_MOVED_BYTES // 4, dtype=torch.float32, device=place["device"])
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source))
    return Limits(2 * _ROWS * _WIDTH * 4 * _WIDTH / linear, 2 * _MOVED_BYTES / copy)


def _seconds(work: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        float(work().flatten()[0])  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times)  # a limit: other work on the machine only adds
