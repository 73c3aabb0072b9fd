"""Steps recorded as CUDA graphs, so that a step is one launch however many kernels it has.

A step that comes for the second time on the same memory is recorded; the first time warms up what
must not be done while recording (autotuning, handles of libraries). A recording reads parameters,
caches and hoisted values where they are, and all other inputs from copies of its own, filled before
each replay. What it returns is copied out, so that a later replay cannot overwrite it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from toca_fx.lower.locks import new_lock
from toca_fx.torch_private import end_allocate_to_pool, foreach_copy_, tree_map_only

log = logging.getLogger(__name__)

_MOST_RECORDINGS = 128  # recordings on one memory: they are small, but each takes a moment to make
_MOST_MOVES = 2

Body = Callable[[Sequence[Any]], Any]


class Recorder(Protocol):
    """Something that records what runs on a device: ``CudaRecorder``, or a stand-in in tests."""

    refusal: str
    """Why nothing is recorded any more; "" as long as it is."""

    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record ``body``; returns a function that replays it, and what it returned.

        Its tensors are written by each replay, and not before.
        """

    def exclusive(self, work: Callable[[], Any]) -> Any:
        """Run ``work``, which replays a recording, while no other of this recorder is replayed."""

    def mark(self) -> Any:
        """A point in the work of the device: all that has been queued so far by the caller."""

    def after(self, mark: Any) -> None:
        """Make all that the caller queues from now on wait for ``mark``."""


class CudaRecorder:
    """The recordings of one program.

    They share one pool of memory, and so must never overlap, whatever stream they are replayed on.
    """

    def __init__(self, device: torch.device) -> None:
        self.refusal = ""
        self._device = device
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = new_lock()
        self._done: torch.cuda.Event | None = None
        self._last: torch.cuda.Stream | None = None

    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See ``Recorder``. Nothing waits for the device."""
        stream, one_at_a_time = _recording_stream(self._device)
        with one_at_a_time, torch.cuda.device(self._device), torch.cuda.stream(stream):
            if not self._graphs:  # a pool goes with the last of its graphs
                self._pool = torch.cuda.graph_pool_handle()
            # The handles and the workspace of cuBLAS belong to thread and stream, and cannot be
            # made while recording.
            torch.mm(*[torch.ones(16, 16, device=self._device)] * 2)
            graph = torch.cuda.CUDAGraph()
            collects = gc.isenabled()
            gc.disable()  # what it frees might be another recording
            try:
                # Other threads may allocate memory meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                found = body()
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
            finally:
                if collects:
                    gc.enable()
        self._graphs.add(graph)
        return graph.replay, found

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed.

        What an invalid one leaves open would be taken for a recording under way by all that
        follows.
        """
        with contextlib.suppress(Exception):
            graph.capture_end()
            return
        with contextlib.suppress(Exception):
            end_allocate_to_pool(self._device.index or 0, self._pool)
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is empty
            nothing = torch.cuda.CUDAGraph()
            nothing.capture_begin(capture_error_mode="thread_local")
            nothing.capture_end()  # this tells the generator of random numbers

    def exclusive(self, work: Callable[[], Any]) -> Any:
        """See ``Recorder``: a lock orders the threads, and an event the streams."""
        with self._lock:
            stream = torch.cuda.current_stream(self._device)
            if self._done is not None and self._last != stream:
                stream.wait_event(self._done)
            try:
                return work()
            finally:
                self._done, self._last = self.mark(), stream

    def mark(self) -> torch.cuda.Event:
        """See ``Recorder``."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def after(self, mark: torch.cuda.Event) -> None:
        """See ``Recorder``."""
        torch.cuda.current_stream(self._device).wait_event(mark)


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on a device; None where there is nothing to gain."""
    return CudaRecorder(device) if device.type == "cuda" else None


@functools.cache
def _recording_stream(device: torch.device) -> tuple[torch.cuda.Stream, threading.RLock]:
    """The stream of a device on which recordings are made, and the lock to take for one.

    There is one per process: libraries keep a workspace for each stream that they were used on.
    """
    return torch.cuda.Stream(device), new_lock()  # type: ignore[no-untyped-call]


@dataclass
class _Recording:
    """A recorded step: ``replay`` reads ``given`` and writes the tensors of ``found``."""

    replay: Callable[[], None]
    given: dict[int, Tensor]
    found: Any


@dataclass
class Recordings:
    """The recordings made on the memory of one generation.

    ``fixed`` and ``varying`` are positions among the inputs of the model: of tensors that stay
    where they are (parameters, buffers), and of those that are new in each call. ``seen`` are the
    steps that have run before, on any memory, and the kinds that have run in each thread.
    """

    recorder: Recorder
    fixed: Sequence[int]
    varying: Sequence[int]
    seen: set[Hashable]
    _found: dict[Hashable, _Recording] = field(default_factory=dict)
    _addresses: tuple[int, ...] | None = None
    _moves: int = 0

    def __len__(self) -> int:
        return len(self._found)

    def run(
        self, kind: Hashable, key: Hashable, body: Body, inputs: Sequence[Any]
    ) -> tuple[Any, str]:
        """Run a step; returns the outputs, and why it was queued, "" if it was replayed.

        ``body`` takes ``inputs`` and does the same for the same ``key`` and memory; steps of one
        ``kind`` run the same kernels.
        """
        self._look_for_moves(inputs)
        recording = self._found.get(key)
        if recording is None:
            if reason := self._reason(kind, key):
                return body(inputs), reason
            try:
                recording = self._found[key] = self._record(body, inputs)
            except Exception as error:  # a step that cannot be recorded can be queued
                says = str(error).strip().partition("\n")[0] or type(error).__name__
                self.recorder.refusal = f"a step could not be recorded: {says}"
                log.warning("toca_fx: steps are queued: %s", self.recorder.refusal)
                return body(inputs), self.recorder.refusal
        return self.recorder.exclusive(functools.partial(self._replay, recording, inputs)), ""

    def _reason(self, kind: Hashable, key: Hashable) -> str:
        """Why a step is not recorded now, or "" if it is to be."""
        if self.recorder.refusal:
            return self.recorder.refusal
        if self._moves >= _MOST_MOVES:
            return "parameters move between calls"
        if len(self._found) >= _MOST_RECORDINGS:
            return f"{_MOST_RECORDINGS} steps are recorded already"
        thread = (kind, threading.get_ident())
        first = not self.seen.issuperset((key, thread))
        self.seen.update((key, thread))
        return "the first time" if first else ""

    def _look_for_moves(self, inputs: Sequence[Any]) -> None:
        """Drop all recordings if parameters have moved, as they would read the old addresses.

        Offloading and ``.data`` move parameters without notice.
        """
        addresses = tuple(map(Tensor.data_ptr, map(inputs.__getitem__, self.fixed)))
        if addresses != self._addresses:
            self._moves += self._addresses is not None
            self._addresses = addresses
            self._found.clear()

    def _record(self, body: Body, inputs: Sequence[Any]) -> _Recording:
        given = {}
        # Normal tensors, even if the caller is in inference mode: the next caller may not be, and
        # could not fill inference tensors.
        with torch.inference_mode(False):
            for at in self.varying:
                value = inputs[at]
                given[at] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=value.device
                )
        replay, found = self.recorder.record(
            lambda: body([given.get(at, value) for at, value in enumerate(inputs)])
        )
        return _Recording(replay, given, found)

    def _replay(self, recording: _Recording, inputs: Sequence[Any]) -> Any:
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for at, own in recording.given.items():
            into, out_of = by_dtype.setdefault(own.dtype, ([], []))
            into.append(_once(own))
            out_of.append(_once(inputs[at]))
        for into, out_of in by_dtype.values():
            foreach_copy_(into, out_of)
        recording.replay()
        return tree_map_only(Tensor, torch.clone, recording.found)


def _once(value: Tensor) -> Tensor:
    """A view of ``value`` that has each element in memory once, if it is expanded."""
    for axis, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[axis] > 1:
            value = value.narrow(axis, 0, 1)
    return value
