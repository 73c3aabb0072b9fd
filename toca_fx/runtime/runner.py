"""A program, and what its generations share: memory, recordings, and what is known of devices."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toca_fx.lower.cuda_graphs import Recordings, recorder_for
from toca_fx.lower.locks import new_lock
from toca_fx.lower.onload import is_offloaded
from toca_fx.lower.program import Program
from toca_fx.plan.plan import Plan
from toca_fx.runtime.gate import gate_of
from toca_fx.runtime.histories import Histories
from toca_fx.runtime.identity import Seen
from toca_fx.runtime.selector import Selector
from toca_fx.runtime.storage import Storage
from toca_fx.runtime.timed_values import TimedValues
from toca_fx.runtime.watch import Watch

MOVING = "weights move or are cast at every call, and a recording reads them where they were"


class Runner:
    """The storages of the generations of ``program``: handed out, and taken back.

    ``inputs`` are those of the first call; the model itself writes to ``written``. What it is made
    of are the others of its state, at ``weights_at``.
    """

    def __init__(
        self, program: Program, inputs: Sequence[Any], written: Sequence[int] = ()
    ) -> None:
        self.program = program
        self._lock = new_lock()
        self._idle: dict[tuple[int, int], list[Storage]] = {}
        self._recorded: weakref.WeakSet[Storage] = weakref.WeakSet()
        self._seen: set[Hashable] = set()
        self._watches: list[Watch] = []
        found = program.analysis.inputs
        self.weights_at = tuple(at for at in found.state if at not in written)
        self._recorder = recorder_for(found.device)
        self._timed_at = self._timed_inputs()
        self.timed_values = TimedValues()
        self._classes = {type(inputs[at]) for at in found.state}

    def acquire(self, plan: Plan, timesteps: int) -> Storage:
        """The storage for a generation of ``plan`` at ``timesteps`` known timesteps.

        Their number is 0 if they are not known.
        """
        steps = timesteps if self.program.analysis.table_fits(timesteps) else 0
        with self._lock:
            idle = self._idle.get((id(plan), steps))
            held = idle.pop() if idle else None
        # Normal tensors, even if the caller is in inference mode: an inference tensor could not be
        # updated outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if held is None:
                return self._new(plan, steps)
            if self._recorder is not None:
                # The last generation may have run on another stream.
                self._recorder.after(held.mark)
            held.clear()
            return held

    def _new(self, plan: Plan, steps: int) -> Storage:
        kept = self.program.new_buffers(plan)
        hoisted, selector = self.program.new_hoisted(steps), Selector(plan, kept)
        histories = Histories(plan, kept)
        gate = gate_of(plan, lags=self.program.analysis.inputs.device.type != "cpu")
        storage = Storage((id(plan), steps), kept, hoisted, selector, histories, gate)
        if self._recorder is not None:
            with self._lock:
                storage.reason = self._queued_because(storage)
                if not storage.reason:
                    at = self.program.analysis.inputs
                    storage.recordings = Recordings(
                        self._recorder, at.state, at.varying, self._seen
                    )
                    self._recorded.add(storage)
        return storage

    def _queued_because(self, storage: Storage) -> str:
        """Why steps on this storage are not recorded; "" if they are."""
        records = self.program.inner.records
        if is_offloaded():
            return MOVING
        if records is False:
            return "the inner backend or its mode says so"
        if storage.selector.draws:
            return "scores.random draws numbers"
        if not self._classes <= {Tensor, nn.Parameter}:
            return "a parameter is a tensor of a class of its own"
        if not self.program.analysis.inputs.on_one_device:
            return "an input is on another device"
        if records:
            return ""
        queued_because = self.program.analysis.queued_because
        if queued_because(storage.total_bytes, self._recorded_bytes):
            self._idle.clear()  # those of generations of other lengths
        return queued_because(storage.total_bytes, self._recorded_bytes)

    @property
    def _recorded_bytes(self) -> int:
        return sum(storage.total_bytes for storage in self._recorded)

    def release(self, storage: Storage) -> None:
        """Take back the storage of a generation that is over.

        If steps were recorded on it, it is kept for the next generation; else it goes back to the
        allocator.
        """
        if storage.recordings is None or self._recorder is None:
            return
        with self._lock:
            if len(storage.recordings):
                storage.mark = self._recorder.mark()
                self._idle.setdefault(storage.key, []).append(storage)
            else:
                self._recorded.discard(storage)

    def _timed_inputs(self) -> list[int]:
        """The inputs that timed values depend on, besides the timestep."""
        found = self.program.analysis
        if not found.hoisted.timed:
            return []
        at = set(found.timed.kept)
        if found.timed.buffers:
            at |= set(found.conditions.kept)
        return sorted(at - {found.inputs.timestep})

    def renew_timed_values(self, inputs: Sequence[Any], state: frozenset[int]) -> TimedValues:
        """Forget the timed values of earlier calls; those to come depend on these inputs."""
        found = self.program.analysis
        # Elsewhere nothing shows that a weight was written through ``.data``.
        most = found.settings.hoisting_bytes if found.inputs.device.type == "cpu" else 0
        self.timed_values = TimedValues(Seen(inputs, self._timed_at, state), most)
        return self.timed_values

    def forget_timed_values(self) -> None:
        """Forget the timed values of earlier calls."""
        self.timed_values = TimedValues()

    def leave_watch(self, watch: Watch) -> None:
        """Keep the watch of a generation that is over before the device has come to its end."""
        with self._lock:
            self._watches.append(watch)

    def take_watches(self) -> list[Watch]:
        """The watches that earlier generations left."""
        with self._lock:
            found, self._watches = self._watches, []
            return found
