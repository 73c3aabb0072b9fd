"""A GPU for the benchmark's tests, on machines that have none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from toca_fx.bench.gpu import Traced


class HostEvent:
    """A mark on the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end_event: HostEvent) -> float:
        return (end_event.at - self.at) * 1e3


class MadeUpGpu:
    """The CPU, as if it were a GPU."""

    kind = "cpu"

    def __init__(self) -> None:
        self.peaks = iter((1_300, 4_000))

    def event(self) -> HostEvent:
        return HostEvent()

    def synchronize(self) -> None:
        pass

    def facts(self) -> dict[str, str | None]:
        return {"device": "NVIDIA Paper 1", "driver": None, "cuda": "13.0"}

    def allocated(self) -> int:
        return 1_000

    def peak(self, work: Callable[[], None]) -> int:
        work()
        return next(self.peaks)

    def traced(self, work: Callable[[], None]) -> Iterable[Traced]:
        work()
        return [Traced("cudaLaunchKernel", False), Traced("triton_poi_fused_0", True)]
