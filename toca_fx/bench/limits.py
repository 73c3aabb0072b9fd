"""What the machine can do at most, measured: products of matrices per second, and bytes moved per
second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from toca_fx.bench.clock import Device

# Rows and width of a transformer's layer: compute-bound, and as large as those that are timed
# (DiT-XL/2; FLUX.1-dev, for a GPU).
_ROWS, _WIDTH = 2048, 1152
_GPU_ROWS, _GPU_WIDTH = 4608, 3072
_MOVED_BYTES = 2**28
_REPEATS = 20


@dataclass(frozen=True)
class Limits:
    """FLOPs per second of a linear layer, and bytes per second of reading one tensor and writing
    another.
    """

    flops: float
    bytes: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for so much work, if moving and computing overlap fully (the roofline)."""
        return max(flops / self.flops, nbytes / self.bytes)


@torch.no_grad()
def measure_limits(place: Mapping[str, Any], device: Device | None = None) -> Limits:
    """Measure on a ``place`` of device and dtype, with the threads that are set; ``device`` is
    given if it runs behind the host.
    """
    rows, width = (_ROWS, _WIDTH) if device is None else (_GPU_ROWS, _GPU_WIDTH)
    x, weight = torch.randn(rows, width, **place), torch.randn(4 * width, width, **place)
    linear = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    source = torch.ones(_MOVED_BYTES // 4, dtype=torch.float32, device=place["device"])
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    return Limits(2 * rows * width * 4 * width / linear, 2 * _MOVED_BYTES / copy)


def _seconds(work: Callable[[], Tensor], device: Device | None) -> float:
    """The least of some runs: a limit, since other work on the machine only adds."""
    if device is None:
        times = []
        for _ in range(_REPEATS + 1):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)
    marks = [device.event() for _ in range(_REPEATS + 2)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    device.synchronize()
    return min(start.elapsed_time(end) for start, end in pairwise(marks)) / 1e3
