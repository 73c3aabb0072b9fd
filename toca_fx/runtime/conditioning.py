"""The hoisted values of one generation: when they are computed, and when they can be used again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from toca_fx.lower.analysis import Wanted
from toca_fx.lower.hoisted_values import HoistedValues
from toca_fx.lower.onload import Each, run_part, run_rows
from toca_fx.runtime import watch, words
from toca_fx.runtime.identity import Seen
from toca_fx.runtime.runner import Runner
from toca_fx.runtime.schedules import Schedule, Timestep
from toca_fx.runtime.watch import Watch

_MANY = 3  # calls in a row with new captions


class Conditioning:
    """Computes the hoisted values of one generation of one model, into ``values``.

    Conditions are computed again when an input that they depend on is another tensor than on the
    call before, or was written to: a text embedding that a pipeline hands over at each step costs
    its projections once. ``timesteps`` are those of all calls of the generation; where they are
    known, the values that depend on them are computed for all of them at once.
    """

    def __init__(
        self,
        runner: Runner,
        values: HoistedValues,
        timesteps: Schedule | None,
        warn: Callable[[str], None],
    ) -> None:
        self._runner, self._program, self._values = runner, runner.program, values
        self._found, self._warn = runner.program.analysis, warn
        self._position = self._found.inputs.timestep
        self._state = frozenset(self._found.inputs.state)
        self._key: Timestep | None = None
        self._known = runner.timed_values
        self._timesteps = self._listed(timesteps)
        self._seen: dict[str, Seen] = {}
        self._filled = False
        self._from_table = self._timesteps is not None
        self._wanted: Wanted | None = None
        self._watch: Watch | None = None
        self._mislisted = False
        self._renewed = 0
        for left in runner.take_watches():
            if not self._check(left):
                runner.leave_watch(left)
        self._mislisted = False  # that was the generation before

    def _listed(self, timesteps: Schedule | None) -> Tensor | None:
        """The timesteps [T] that values are computed for at once; None: values are not."""
        if timesteps is None or self._position is None or not self._found.hoisted.timed:
            return None
        if any(len(each) != 1 for each in timesteps):  # one per row or frame: in the calls
            return None
        if not self._found.table_fits(len(timesteps)):
            return None
        return torch.tensor(timesteps, dtype=torch.float64).flatten()

    @property
    def listed(self) -> bool:
        """Whether the timed values of this call come from the table of all timesteps."""
        return self._from_table

    def prepare(
        self, inputs: Sequence[Any], call: int, timestep: Timestep | None, wanted: Wanted
    ) -> int:
        """Compute the values that are missing or have changed, ahead of call number ``call``.

        ``timestep`` is that of the call, None if it is not read; what its step does not want stays
        as it is, for a later one to find it changed. Returns the FLOPs that it took. If it raises,
        what was seen has not been computed.
        """
        self._wanted, spent, renewed = wanted, 0, False
        if wanted.conditions:
            spent, renewed = self._renew_conditions(inputs)
        if not wanted.names:
            self._from_table = False
            return spent
        if self._is_listed(inputs, call, timestep):
            filled = self._fill_table(inputs, renewed)
            if filled is not None:
                self._from_table = True
                return spent + filled
        self._from_table, self._key = False, timestep
        self._known = self._runner.timed_values  # another thread's may take its place
        if not self._known.fit(inputs):
            self._known = self._runner.renew_timed_values(inputs, self._state)
        return spent + (0 if timestep in self._known else wanted.flops)

    def _renew_conditions(self, inputs: Sequence[Any]) -> tuple[int, bool]:
        """Compute the conditions if they have changed; returns the FLOPs, and whether they have."""
        found = self._found
        kept = found.conditions.kept
        renewed = bool(found.hoisted.conditions) and self._changed("conditions", inputs)
        if renewed:
            if found.timed.buffers:  # first of all, and whether or not this call reads the table
                self._filled = False
            given = [inputs[position] for position in kept]
            with torch.no_grad():
                computed = run_part(found.conditions.module, *given)
                torch._foreach_copy_(self._values.conditions, list(computed))
            self._see("conditions", inputs, kept)
        self._renewed = self._renewed + 1 if renewed else 0
        if self._renewed == _MANY:
            self._warn(words.REBUILT)
        return found.hoisted_flops[0] if renewed else 0, renewed

    def _fill_table(self, inputs: Sequence[Any], renewed: bool) -> int | None:
        """Fill the table if its values have changed; returns the FLOPs that it took.

        Where they do so at every call it would be computed for all steps at every step: it is
        filled at first, and then if a call has what the one before had. None: it is not filled.
        """
        found, timesteps = self._found, self._timesteps
        if timesteps is None:
            raise AssertionError("no timesteps are known")
        kept = [position for position in found.timed.kept if position != self._position]
        is_first = "timed" not in self._seen
        changed = self._changed("timed", inputs) or (renewed and bool(found.timed.buffers))
        if self._filled and not changed:
            return 0
        self._filled = False
        if not changed or is_first:
            self._fill(inputs, timesteps)
            self._filled = True
        self._see("timed", inputs, kept)
        return found.hoisted_flops[1] * len(timesteps) if self._filled else None

    def bring(self, inputs: Sequence[Any], call: int) -> None:
        """Copy the timed values of this call to where the step graph reads them.

        On an accelerator it may be recorded.
        """
        wanted = self._wanted
        if wanted is None or not wanted.names:
            return
        if not self._from_table or self._position is None:
            self._compute(inputs, wanted)
        elif watch.reading_waits(inputs[self._position]):
            self._values.look_up(inputs[self._position])
        else:
            self._values.take(call)

    def _compute(self, inputs: Sequence[Any], wanted: Wanted) -> None:
        """Compute the wanted timed values of this call, or take all from an earlier one."""
        known, part = self._known, wanted.part
        values = known.get(self._key)
        if values is not None:
            self._values.put_rows(values)
            return
        given = [inputs[position] for position in part.kept]
        conditions = (self._values.tensors[buffer] for buffer in part.buffers)
        self._values.put(wanted.names, self._program.timed(wanted)(*given, *conditions))
        if wanted.names == self._found.hoisted.timed:
            known.keep(self._key, self._values.rows)

    def forget(self) -> None:
        """Compute all values again at the next call: somebody wrote where nobody could see it."""
        self._seen.clear()
        self._filled = False
        self._runner.forget_timed_values()

    def close(self) -> None:
        """Warn of what the device has found out by now; the rest is left to the next generation."""
        if self._timesteps is not None and not self._mislisted:
            last = Watch(self._values.doubts)
            if not self._check(last):
                self._runner.leave_watch(last)

    def _is_listed(self, inputs: Sequence[Any], call: int, timestep: Timestep | None) -> bool:
        """Whether this call is at the timestep that is listed for it.

        An accelerator finds that out by itself, and nothing waits for it.
        """
        if self._timesteps is None or self._position is None or call >= len(self._timesteps):
            return False
        given = inputs[self._position]
        if not watch.reading_waits(given):
            # If it is off by rounding, it counts as not listed: exact values cost little.
            return timestep == (self._timesteps[call].to(given.dtype).item(),)
        if given.dim() > 1:  # with one timestep per token they differ
            return False
        if self._watch is None:
            self._watch = Watch(self._values.doubts)
        elif self._check(self._watch):
            self._watch = None
        return not self._mislisted

    def _check(self, left: Watch) -> bool:
        """Warn of what the device has found out; returns whether that is known by now."""
        found = left.seen()
        if found is None:
            return False
        if any(found):
            self._mislisted = True
            self._warn(words.LOST)
        return True

    def _fill(self, inputs: Sequence[Any], timesteps: Tensor) -> None:
        """Compute the values at all timesteps."""
        part, position = self._found.timed, self._position
        if position is None:
            raise AssertionError("no timesteps are known")
        timestep = inputs[position]
        if watch.reading_waits(timestep):
            self._values.timesteps.copy_(timesteps, non_blocking=True)
        listed = timesteps.to(timestep.dtype).to(timestep.device, non_blocking=True)
        stacked = listed.reshape(-1, *[1] * timestep.dim()).expand(-1, *timestep.shape)
        exact = self._program.inner.exact
        own = Each(stacked) if exact else stacked
        given = [own if at == position else inputs[at] for at in part.kept]
        given += [self._values.tensors[buffer] for buffer in part.buffers]
        with torch.no_grad():
            if exact:
                self._values.fill(run_rows(part.module, len(timesteps), *given))
                return
            axes = tuple(0 if each is own else None for each in given)
            run = functools.partial(run_part, part.module)
            self._values.fill(torch.func.vmap(run, in_dims=axes)(*given))

    def _changed(self, what: str, inputs: Sequence[Any]) -> bool:
        """Whether inputs are others than those that were seen last, or were written to since.

        If so they are forgotten, until their values have been computed.
        """
        seen = self._seen.get(what)
        if seen is not None and not seen.differ(inputs):
            return False
        self._seen.pop(what, None)
        return True

    def _see(self, what: str, inputs: Sequence[Any], kept: Sequence[int]) -> None:
        self._seen[what] = Seen(inputs, kept, self._state)
