"""What the machine can do at most, measured: FLOPs and bytes moved per second."""

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
    """What a machine does per second: FLOPs of a linear layer, bytes of copying a tensor.

    Bytes are those read and those written.
    """

    flops: float
    bytes: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for so much work, if moving and computing overlap fully (the roofline)."""
        return max(flops / self.flops, nbytes / self.bytes)


@torch.no_grad()
def measure_limits(factory: Mapping[str, Any], device: Device | None = None) -> Limits:
    """Measure the limits of a device and dtype, with the threads that are set.

    ``factory`` are the keyword arguments ``device`` and ``dtype``. ``device`` is given if it is
    asynchronous to the host.
    """
    rows, width = (_ROWS, _WIDTH) if device is None else (_GPU_ROWS, _GPU_WIDTH)
    x, weight = torch.randn(rows, width, **factory), torch.randn(4 * width, width, **factory)
    linear = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    source = torch.ones(_MOVED_BYTES // 4, dtype=torch.float32, device=factory["device"])
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    return Limits(2 * rows * width * 4 * width / linear, 2 * _MOVED_BYTES / copy)


def _seconds(work: Callable[[], Tensor], device: Device | None) -> float:
    """The least seconds of some runs, since other work on the machine only adds to them."""
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
