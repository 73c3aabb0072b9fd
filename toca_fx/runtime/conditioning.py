"""The hoisted values of one generation: when they are computed, and when they can be used again."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from toca_fx.lower.hoisted_values import HoistedValues, distance
from toca_fx.runtime import clock, watch
from toca_fx.runtime.runner import Runner
from toca_fx.runtime.watch import Watch

log = logging.getLogger(__name__)

_VERSION = operator.attrgetter("_version")


class Conditioning:
    """Computes the hoisted values of one generation of one model, into ``values``.

    Conditions are computed again when an input that they depend on is another tensor than on the
    call before, or was written to: a text embedding that a pipeline hands over at each step costs
    its projections once. ``timesteps`` [T] are those of all calls of the generation; where they are
    known, the values that depend on them are computed for all of them at once.
    """

    def __init__(
        self,
        runner: Runner,
        values: HoistedValues,
        timesteps: Tensor | None,
        warn: Callable[[str], None],
    ) -> None:
        self._runner, self._program, self._values = runner, runner.program, values
        self._found, self._warn = runner.program.analysis, warn
        self._position = self._found.inputs.timestep
        known = (
            timesteps is not None
            and self._position is not None
            and self._found.hoisted.timed
            and self._found.table_fits(len(timesteps))
        )
        self._timesteps = timesteps if known else None
        self._seen: dict[str, tuple[list[Any], list[int]]] = {}
        self._from_table = self._timesteps is not None
        self._watch: Watch | None = None
        self._mislisted = False
        self._distinct = True
        for left in runner.take_watches():
            if not self._check(left):
                runner.leave_watch(left)
        self._mislisted = False  # that was the generation before

    @property
    def listed(self) -> bool:
        """Whether the timed values of this call come from the table of all timesteps."""
        return self._from_table

    def prepare(self, inputs: Sequence[Any], call: int) -> int:
        """Compute the values that are missing or have changed, ahead of call number ``call``.

        Returns the FLOPs that it took.
        """
        try:
            return self._prepare(inputs, call)
        except BaseException:
            self._seen.clear()  # what was seen has not been computed
            raise

    def _prepare(self, inputs: Sequence[Any], call: int) -> int:
        found, spent = self._found, 0
        given = [inputs[position] for position in found.conditions.kept]
        renewed = bool(found.hoisted.conditions) and self._changed("conditions", given)
        if renewed:
            with torch.no_grad():
                torch._foreach_copy_(self._values.conditions, list(found.conditions.module(*given)))
            spent += found.hoisted_flops[0]
        if not found.hoisted.timed:
            return spent
        self._from_table = self._is_listed(inputs, call)
        if not self._from_table or self._timesteps is None:
            return spent + found.hoisted_flops[1]
        kept = [inputs[position] for position in found.timed.kept if position != self._position]
        if self._changed("timed", kept) or (renewed and found.timed.buffers):
            if -1 in self._seen["timed"][1]:  # every call would compute the values of all
                self._from_table = False
                return spent + found.hoisted_flops[1]
            self._fill(inputs, self._timesteps)
            spent += found.hoisted_flops[1] * len(self._timesteps)
        return spent

    def bring(self, inputs: Sequence[Any], call: int) -> None:
        """Copy the timed values of this call to where the step graph reads them.

        On an accelerator it may be recorded.
        """
        if not self._found.hoisted.timed:
            return
        timed = self._found.timed
        if not self._from_table or self._position is None:
            given = [inputs[position] for position in timed.kept]
            conditions = (self._values.tensors[buffer] for buffer in timed.buffers)
            self._values.put(self._program.run_timed(*given, *conditions))
        elif watch.reading_waits(inputs[self._position]):
            self._values.look_up(inputs[self._position])
        else:
            self._values.take(call)

    def close(self) -> None:
        """Warn of what the device has found out by now; the rest is left to the next generation."""
        if self._timesteps is not None and not self._mislisted:
            last = Watch(self._values.doubts)
            if not self._check(last):
                self._runner.leave_watch(last)

    def _is_listed(self, inputs: Sequence[Any], call: int) -> bool:
        """Whether this call is at the timestep that is listed for it.

        An accelerator finds that out by itself, and nothing waits for it; only the first call of a
        schedule that was never given before is read there too. If its timesteps are in other units
        than the model's, values are computed in the calls.
        """
        if self._timesteps is None or self._position is None:
            return False
        timestep = inputs[self._position]
        if not watch.reading_waits(timestep):
            # If it is off by rounding, it counts as not listed: exact values cost little.
            if not self._agrees(timestep, call):
                return False
            return bool((timestep == self._timesteps[call].to(timestep)).all())
        # With one timestep per token they differ. Beyond the list there is nothing to look up.
        if timestep.dim() > 1 or call >= len(self._timesteps):
            return False
        if call == 0 and not self._runner.is_confirmed(self._timesteps):
            self._mislisted = not self._agrees(timestep, call)
            if not self._mislisted:
                self._runner.confirm(self._timesteps)
        elif self._watch is None:
            self._watch = Watch(self._values.doubts)
        elif self._check(self._watch):
            self._watch = None
        return not self._mislisted

    def _agrees(self, timestep: Tensor, call: int) -> bool:
        """Whether the timestep is the one listed for the call, but for rounding; warns if not."""
        if self._timesteps is not None and call < len(self._timesteps):
            is_same = bool(distance(timestep, self._timesteps[call]).amax() <= 0)
        else:
            is_same = False
        if is_same:
            return True
        self._warn(
            "the model is called at another timestep than session(timesteps=...) gives for the "
            "call, so that its modulations are computed in the call; give the values of the "
            "model's timestep argument, call by call"
        )
        return False

    def _check(self, left: Watch) -> bool:
        """Warn of what the device has found out; returns whether that is known by now."""
        found = left.seen()
        if found is None:
            return False
        lost, repeated = found
        if lost:
            self._mislisted = True
            self._warn(
                "the model was called at a timestep that session(timesteps=...) does not list, and "
                "its outputs there are NaN. Give the values of the model's timestep argument, call "
                "by call"
            )
        elif repeated and self._distinct:
            self._warn(clock.same_timestep(caches=True))
        return True

    def _fill(self, inputs: Sequence[Any], timesteps: Tensor) -> None:
        """Compute the values at all timesteps."""
        part, position = self._found.timed, self._position
        if position is None:
            raise AssertionError("no timesteps are known")
        timestep = inputs[position]
        if watch.reading_waits(timestep):
            self._values.timesteps.copy_(timesteps, non_blocking=True)
        rounded = timesteps.to(timestep.dtype)
        self._distinct = len(set(rounded.tolist())) == len(rounded)
        listed = rounded.to(timestep.device, non_blocking=True)
        stacked = listed.reshape(-1, *[1] * timestep.dim()).expand(-1, *timestep.shape)
        given = [stacked if at == position else inputs[at] for at in part.kept]
        given += [self._values.tensors[buffer] for buffer in part.buffers]
        axes = [0 if at == position else None for at in part.kept] + [None] * len(part.buffers)
        with torch.no_grad():
            self._values.fill(torch.func.vmap(part.module, in_dims=tuple(axes))(*given))

    def _changed(self, what: str, values: list[Any]) -> bool:
        """Whether ``values`` are others than at the last call, or were written to since.

        They are kept for the next call, and with them their addresses.
        """
        try:
            versions = list(map(_VERSION, values))  # hundreds of weights, at every call
        except (AttributeError, RuntimeError):  # numbers, and tensors made in inference mode
            versions = list(map(_version, values))
        before = self._seen.get(what)
        self._seen[what] = (values, versions)
        if before is None or versions != before[1] or -1 in versions:
            return True
        return any(map(operator.is_not, values, before[0])) and any(map(_differ, values, before[0]))


def _version(value: Any) -> int:
    """How often a tensor was written to; -1 for one made in inference mode, which has no count."""
    if not isinstance(value, Tensor):
        return 0
    return -1 if value.is_inference() else value._version


def _differ(one: Any, other: Any) -> bool:
    return one is not other if isinstance(one, Tensor) else bool(one != other)
