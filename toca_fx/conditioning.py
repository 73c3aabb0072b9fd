"""The hoisted values of one generation: when they are computed, and when they can be used again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from toca_fx.program import Program

log = logging.getLogger(__name__)

# Reading a timestep waits for an accelerator, so there it is done for the first calls of a generation only.
_READ_FREELY = frozenset({"cpu"})
_READ_CALLS = 2


class Conditioning:
    """Computes what is hoisted out of the steps of ``program`` for one generation.

    Conditions are computed again when an input that they depend on is another tensor than on the call before, or was written to: a text
    embedding that a pipeline hands over at each step costs its projections once. ``timesteps`` [T] are those of all calls of the
    generation; where they are known, what depends on them is computed for all of them at once.
    """

    def __init__(self, program: Program, timesteps: Tensor | None, position: int | None, warn: Callable[[str], None]) -> None:
        self._program, self._position, self._warn = program, position, warn
        self._timesteps = timesteps if self._fits(timesteps) else None
        self._conditions: dict[str, Tensor] = {}
        self._table: dict[str, Tensor] = {}
        self._seen: dict[str, list[tuple[Any, int]]] = {}
        self._as_given = True
        self._lost: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the values take (or will take)."""
        conditions, timed = self._program.hoisted_bytes
        return conditions + timed * (1 if self._timesteps is None else len(self._timesteps))

    def values(self, inputs: Sequence[Any], call: int) -> tuple[dict[str, Tensor], int]:
        """The hoisted values for a call of the model, by name of their buffer, and the FLOPs that it took to get them."""
        program, spent = self._program, 0
        given = {position: inputs[position] for position in program.conditions.kept}
        if program.hoisted.conditions and self._changed("conditions", given.values()):
            with torch.no_grad():
                self._conditions = dict(zip(program.hoisted.conditions, program.conditions.module(*given.values()), strict=True))
            self._table = {}
            spent += program.hoisted_flops[0]
        if not program.hoisted.timed:
            return self._named(self._conditions), spent
        row = self._row(inputs, call)
        if row is None:
            given = {position: inputs[position] for position in program.timed.kept}
            found = program.run_timed(*given.values(), *(self._conditions[name] for name in program.timed.given))
            return self._named({**self._conditions, **dict(zip(program.hoisted.timed, found, strict=True))}), spent + program.hoisted_flops[
                1
            ]
        kept = [inputs[position] for position in program.timed.kept if position != self._position]
        if self._changed("timed", kept) or not self._table:
            self._table = self._all_timesteps(inputs)
            spent += program.hoisted_flops[1] * (0 if self._timesteps is None else len(self._timesteps))
        return self._named({**self._conditions, **{name: _take(values, row) for name, values in self._table.items()}}), spent

    def close(self) -> None:
        """Tell of what nobody waited for."""
        if self._lost is not None and bool(self._lost):
            self._warn(
                "on an accelerator, the model was called at a timestep that session(timesteps=...) does not list, after two that it does; "
                "the outputs from there on are NaN. Give the values of the model's timestep argument, call by call"
            )

    def _fits(self, timesteps: Tensor | None) -> bool:
        """Whether the values for all timesteps fit into the memory that the policy allows."""
        conditions, timed = self._program.hoisted_bytes
        return timesteps is not None and conditions + timed * len(timesteps) <= self._program.policy.hoisting.memory_bytes

    def _row(self, inputs: Sequence[Any], call: int) -> int | Tensor | None:
        """Which of the timesteps this call is at; None if that is not known."""
        if self._timesteps is None or self._position is None:
            return None
        timestep, freely = inputs[self._position], inputs[self._position].device.type in _READ_FREELY
        if not freely and not self._as_given:
            return None
        if not freely and call >= _READ_CALLS:
            return self._row_on_device(timestep)
        if call < len(self._timesteps) and bool(_distance(timestep, self._timesteps[call]).amax() <= 0):
            exact = not freely or bool((timestep == self._timesteps[call].to(timestep)).all())
            return call if exact else None
        self._as_given = False
        self._warn(
            "the model is called at another timestep than session(timesteps=...) gives for the call, so that its modulations are "
            "computed in the call; give the values of the model's timestep argument, call by call"
        )
        return None

    def _row_on_device(self, timestep: Tensor) -> Tensor:
        """The row [] of the table, without waiting for the device; its last one, which is NaN, if the timestep is not listed."""
        if self._timesteps is None:
            raise AssertionError("no timesteps are known")
        self._timesteps = self._timesteps.to(timestep.device, torch.float32)  # stays there from the first call on
        apart = _distance(timestep.reshape(1, -1), self._timesteps[:, None]).amax(dim=1)
        lost = apart.amin() > 0
        self._lost = lost if self._lost is None else self._lost | lost
        return torch.where(lost, len(apart), apart.argmin())

    def _all_timesteps(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """The values of all timesteps, [T, ...] each."""
        part, position = self._program.timed, self._position
        if self._timesteps is None or position is None:
            raise AssertionError("no timesteps are known")
        timestep = inputs[position]
        stacked = self._timesteps.to(timestep).reshape(-1, *[1] * timestep.dim()).expand(-1, *timestep.shape)
        given = [stacked if at == position else inputs[at] for at in part.kept]
        given += [self._conditions[name] for name in part.given]
        axes = tuple(0 if at == position else None for at in part.kept) + (None,) * len(part.given)
        with torch.no_grad():
            values = torch.func.vmap(part.module, in_dims=axes)(*given)
            if timestep.device.type not in _READ_FREELY:
                values = [torch.cat([value, torch.full_like(value[:1], torch.nan if value.is_floating_point() else 0)]) for value in values]
            return dict(zip(part.names, values, strict=True))

    def _changed(self, what: str, values: Iterable[Any]) -> bool:
        """Whether ``values`` are others than at the last call, or were written to since; they are kept, and so are their addresses."""
        now = [(value, _version(value)) for value in values]
        before = self._seen.get(what)
        self._seen[what] = now
        if before is None:
            return True
        return any(_differ(one, other) for one, other in zip(now, before, strict=True))

    def _named(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"hoisted:{name}": value for name, value in values.items()}


def _distance(timestep: Tensor, listed: Tensor) -> Tensor:
    """How far apart they are, beyond the rounding of the timestep's type: bfloat16(t) / 1000 is not bfloat16(t / 1000)."""
    rounding = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
    return (timestep.to(listed) - listed).abs() - rounding * listed.abs()


def _take(values: Tensor, row: int | Tensor) -> Tensor:
    return values.index_select(0, row[None])[0] if isinstance(row, Tensor) else values[row]


def _version(value: Any) -> int:
    """How often a tensor was written to; -1 if nobody counts (a tensor made in inference mode)."""
    if not isinstance(value, Tensor):
        return 0
    return -1 if value.is_inference() else value._version


def _differ(one: tuple[Any, int], other: tuple[Any, int]) -> bool:
    (left, left_version), (right, right_version) = one, other
    if not isinstance(left, Tensor):
        return bool(left != right)
    return left is not right or left_version != right_version or left_version < 0
