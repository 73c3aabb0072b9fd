"""The hoisted values of one generation: when they are computed, and when they can be used again."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from toca_fx.lower.hoisted_values import HoistedValues, distance
from toca_fx.lower.program import Program
from toca_fx.runtime import watch
from toca_fx.runtime.watch import Watch

log = logging.getLogger(__name__)

_VERSION = operator.attrgetter("_version")


class Conditioning:
    """Computes what is hoisted out of the steps of ``program`` for one generation, into ``values``.

    Conditions are computed again when an input that they depend on is another tensor than on the
    call before, or was written to: a text embedding that a pipeline hands over at each step costs
    its projections once. ``timesteps`` [T] are those of all calls of the generation; where they are
    known, what depends on them is computed for all of them at once. ``position`` is that of the
    timestep among the inputs.
    """

    def __init__(
        self,
        program: Program,
        values: HoistedValues,
        timesteps: Tensor | None,
        position: int | None,
        warn: Callable[[str], None],
    ) -> None:
        self._program, self._values, self._position, self._warn = program, values, position, warn
        known = (
            timesteps is not None
            and position is not None
            and program.hoisted.timed
            and program.table_fits(len(timesteps))
        )
        self._timesteps = timesteps if known else None
        self._seen: dict[str, tuple[list[Any], list[int]]] = {}
        self._as_listed = self._timesteps is not None
        self._watch: Watch | None = None
        self._is_lost = False
        self._distinct = True
        for left in program.take_watches():
            if not self._heed(left):
                program.leave_watch(left)
        self._is_lost = False  # whatever became of the generation before

    @property
    def listed(self) -> bool:
        """Whether the timed values of this call come from the table of all timesteps."""
        return self._as_listed

    def prepare(self, inputs: Sequence[Any], call: int) -> int:
        """Compute what is not there yet or has changed, ahead of the ``call``-th step; the FLOPs
        that it took.
        """
        try:
            return self._prepare(inputs, call)
        except BaseException:
            self._seen.clear()  # what was seen has not been computed
            raise

    def _prepare(self, inputs: Sequence[Any], call: int) -> int:
        program, spent = self._program, 0
        given = [inputs[position] for position in program.conditions.kept]
        renewed = bool(program.hoisted.conditions) and self._changed("conditions", given)
        if renewed:
            with torch.no_grad():
                torch._foreach_copy_(
                    self._values.conditions, list(program.conditions.module(*given))
                )
            spent += program.hoisted_flops[0]
        if not program.hoisted.timed:
            return spent
        self._as_listed = self._is_listed(inputs, call)
        if not self._as_listed or self._timesteps is None:
            return spent + program.hoisted_flops[1]
        kept = [inputs[position] for position in program.timed.kept if position != self._position]
        if self._changed("timed", kept) or (renewed and program.timed.given):
            if -1 in self._seen["timed"][1]:  # every call would compute the values of all
                self._as_listed = False
                return spent + program.hoisted_flops[1]
            self._fill(inputs, self._timesteps)
            spent += program.hoisted_flops[1] * len(self._timesteps)
        return spent

    def bring(self, inputs: Sequence[Any], call: int) -> None:
        """Bring the timed values of this call to where the step graph reads them. May be recorded
        on an accelerator.
        """
        program = self._program
        if not program.hoisted.timed:
            return
        if not self._as_listed or self._position is None:
            given = [inputs[position] for position in program.timed.kept]
            conditions = (self._values.tensors[f"hoisted:{name}"] for name in program.timed.given)
            self._values.put(program.run_timed(*given, *conditions))
        elif watch.reading_waits(inputs[self._position]):
            self._values.look_up(inputs[self._position])
        else:
            self._values.take(call)

    def close(self) -> None:
        """Tell of what nobody waited for; what is not known yet is left to the next generation."""
        if self._timesteps is not None and not self._is_lost:
            last = Watch(self._values.doubts)
            if not self._heed(last):
                self._program.leave_watch(last)

    def _is_listed(self, inputs: Sequence[Any], call: int) -> bool:
        """Whether this call is at the timestep that was told for it; an accelerator finds that out
        by itself.

        But the first call of a schedule that was never told before is read there too: timesteps in
        other units than the model's are then computed in the calls, instead of being found to be
        none of those listed.
        """
        if self._timesteps is None or self._position is None:
            return False
        timestep = inputs[self._position]
        if not watch.reading_waits(timestep):
            # Off by rounding: exact values cost little.
            return self._agrees(timestep, call) and bool(
                (timestep == self._timesteps[call].to(timestep)).all()
            )
        # One timestep per token says that they differ. Beyond the list there is nothing to look up.
        if timestep.dim() > 1 or call >= len(self._timesteps):
            return False
        if call == 0 and not self._program.is_confirmed(self._timesteps):
            self._is_lost = not self._agrees(timestep, call)
            if not self._is_lost:
                self._program.confirm(self._timesteps)
        elif self._watch is None:
            self._watch = Watch(self._values.doubts)
        elif self._heed(self._watch):
            self._watch = None
        return not self._is_lost

    def _agrees(self, timestep: Tensor, call: int) -> bool:
        """Whether the timestep is, but for rounding, the one that was told for the call; warns if
        not.
        """
        told = (
            self._timesteps[call]
            if self._timesteps is not None and call < len(self._timesteps)
            else None
        )
        if told is not None and bool(distance(timestep, told).amax() <= 0):
            return True
        self._warn(
            "the model is called at another timestep than session(timesteps=...) gives for the call, so that its modulations are "
            "computed in the call; give the values of the model's timestep argument, call by call"
        )
        return False

    def _heed(self, left: Watch) -> bool:
        """Warn of what the device has found out; whether it is known by now."""
        found = left.seen()
        if found is None:
            return False
        lost, repeated = found
        if lost:
            self._is_lost = True
            self._warn(
                "the model was called at a timestep that session(timesteps=...) does not list, and its outputs there are NaN. Give the "
                "values of the model's timestep argument, call by call"
            )
        elif repeated and self._distinct:
            self._warn(
                "two calls in a row had the same timestep, and they share caches and clock; if they are guidance branches, set `guidance: "
                "{layout: separate}` in the policy, or wrap each kind of call in toca_fx.branch(name)"
            )
        return True

    def _fill(self, inputs: Sequence[Any], timesteps: Tensor) -> None:
        """Compute the values at all timesteps."""
        part, position = self._program.timed, self._position
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
        given += [self._values.tensors[f"hoisted:{name}"] for name in part.given]
        axes = tuple(0 if at == position else None for at in part.kept) + (None,) * len(part.given)
        with torch.no_grad():
            self._values.fill(torch.func.vmap(part.module, in_dims=axes)(*given))

    def _changed(self, what: str, values: list[Any]) -> bool:
        """Whether ``values`` are others than at the last call, or were written to since; they are
        kept, and so are their addresses.
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
    """How often a tensor was written to; -1 if nobody counts (a tensor made in inference mode)."""
    if not isinstance(value, Tensor):
        return 0
    return -1 if value.is_inference() else value._version


def _differ(one: Any, other: Any) -> bool:
    return one is not other if isinstance(one, Tensor) else bool(one != other)
