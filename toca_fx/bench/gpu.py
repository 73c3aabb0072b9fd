"""What is measured on a GPU only: its own time, memory at the peak, and launches by the host."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from toca_fx.bench.clock import Device, Event, Timed

# The launches of the runtime, and of the driver, which is what Triton uses. Versions and variants
# follow the name: cudaLaunchKernelExC_v11060.
_KERNEL = re.compile(r"cu(da)?Launch(Cooperative)?Kernel")
_GRAPH = re.compile(r"cu(da)?GraphLaunch")
_NO_KERNEL = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Traced:
    """Something that a profiler saw, on the device or on the host."""

    name: str
    on_device: bool


@dataclass(frozen=True)
class Launches:
    """The launches of one model call.

    ``kernels`` and ``graphs`` (CUDA graphs) are those that the host launched, ``ran`` are the
    kernels that the device ran, those of graphs included.
    """

    kernels: int
    graphs: int
    ran: int

    def __str__(self) -> str:
        counts = ((self.kernels, "kernel"), (self.graphs, "graph"))
        shown = [f"{number} {noun}{'s' * (number != 1)}" for number, noun in counts if number]
        return ", ".join(shown) or "none"


class Gpu(Device, Protocol):
    """A device that has a memory of its own and is given its work in launches."""

    @property
    def kind(self) -> str:
        """The type of such devices in torch."""

    def facts(self) -> dict[str, str | None]:
        """What results depend on: the card, its driver and so on; None if unknown."""

    def allocated(self) -> int:
        """Bytes held by tensors now."""

    def peak(self, work: Callable[[], None]) -> int:
        """Bytes held by tensors when ``work`` held most."""

    def traced(self, work: Callable[[], None]) -> Iterable[Traced]:
        """What a profiler sees while ``work`` is done."""


class Cuda:
    """The current CUDA device."""

    kind = "cuda"

    def event(self) -> Event:
        """A new mark."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait until all work is done."""
        torch.cuda.synchronize()

    def facts(self) -> dict[str, str | None]:
        """Card, driver and CUDA runtime."""
        return {
            "device": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }

    def allocated(self) -> int:
        """Bytes held by tensors now."""
        return torch.cuda.memory_allocated()

    def peak(self, work: Callable[[], None]) -> int:
        """Bytes held by tensors when ``work`` held most."""
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def traced(self, work: Callable[[], None]) -> list[Traced]:
        """What torch's profiler sees while ``work`` is done.

        The names that code gives to its parts are left out: they appear on the device too.
        """
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            work()
            torch.cuda.synchronize()
        events: Iterable[Any] = found.events() or ()
        return [
            Traced(event.name, event.device_type.name == "CUDA")
            for event in events
            if not event.is_user_annotation
        ]


def _driver() -> str | None:
    """The version of the driver, as nvidia-smi says; None if there is none. torch has no answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


def launches(seen: Iterable[Traced]) -> Launches | None:
    """The launches in what a profiler saw; None if it saw nothing of the device.

    Profiling a device may be forbidden.
    """
    kernels = graphs = ran = 0
    for event in seen:
        if event.on_device:
            ran += not event.name.startswith(_NO_KERNEL)
        else:
            kernels += _KERNEL.match(event.name) is not None
            graphs += _GRAPH.match(event.name) is not None
    return Launches(kernels, graphs, ran) if ran else None


def launches_by_kind(
    contestant: Timed, calls: Sequence[Any], kinds: Sequence[str], gpu: Gpu
) -> dict[str, Launches | None]:
    """The launches of the middle step of each kind, in one more generation.

    ``kinds`` are those of all ``calls``.
    """
    calls_of: dict[str, list[int]] = {}
    for at, kind in enumerate(kinds):
        calls_of.setdefault(kind, []).append(at)
    traced = {found[len(found) // 2]: kind for kind, found in calls_of.items()}
    counted = {}
    with contestant.generation():
        for at, call in enumerate(calls):
            if at in traced:
                counted[traced[at]] = launches(gpu.traced(partial(contestant.step, call)))
            else:
                contestant.step(call)
    return counted
