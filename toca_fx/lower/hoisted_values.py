"""Where the hoisted values of a generation lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from toca_fx.plan import buffers
from toca_fx.rewrite.hoist import Hoisted
from toca_fx.torch_private import foreach_copy_

_ALIGNMENT = 64  # bytes; compilers take for granted that inputs are aligned


class HoistedValues:
    """Tensors for all hoisted values, always the same ones, so that a recorded step finds them.

    ``tensors`` are the inputs of the step graphs (role ``hoisted``). Those of the timed values are
    views of one row per dtype, so that one copy out of ``tables``, [T, width] for T known
    timesteps, brings all of them.
    """

    def __init__(self, hoisted: Hoisted, values: Mapping[str, Tensor], steps: int) -> None:
        """Allocate them: ``values`` are (fake) tensors like them, by name, and ``steps`` is T.

        T is 0 if no timesteps are known.
        """
        made = {
            name: torch.empty(value.shape, dtype=value.dtype, device=value.device)
            for name, value in ((name, values[name]) for name in hoisted.conditions)
        }
        self.conditions = list(made.values())
        widths: dict[torch.dtype, int] = {}
        columns: dict[str, tuple[torch.dtype, int]] = {}
        for name in hoisted.timed:
            dtype, numel = values[name].dtype, values[name].numel()
            start = widths.get(dtype, 0)
            columns[name] = (dtype, start)
            of_line = _ALIGNMENT // dtype.itemsize
            widths[dtype] = start + -(numel // -of_line) * of_line
        device = values[hoisted.timed[0]].device if hoisted.timed else None
        self._rows = {
            dtype: torch.zeros(width, dtype=dtype, device=device) for dtype, width in widths.items()
        }
        self.tables = {
            dtype: torch.empty(steps, width, dtype=dtype, device=device)
            for dtype, width in widths.items()
        }
        self._columns = columns
        for name, (dtype, start) in columns.items():
            row = self._rows[dtype][start : start + values[name].numel()]
            made[name] = row.view(values[name].shape)
        self.tensors = {buffers.hoisted(name): tensor for name, tensor in made.items()}
        # The timesteps [T], and whether some call was at one that is not listed.
        self.timesteps = torch.zeros(steps, dtype=torch.float32, device=device)
        self.doubts = torch.zeros(1, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (*self.conditions, *self._rows.values(), *self.tables.values())
        return sum(tensor.nbytes for tensor in held)

    def clear(self) -> None:
        """Begin a generation."""
        self.doubts.zero_()

    def put(self, names: Sequence[str], found: Sequence[Tensor]) -> None:
        """Write timed values of the present step."""
        foreach_copy_([self.tensors[buffers.hoisted(name)] for name in names], list(found))

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """All timed values of the present step, as one tensor per dtype."""
        return tuple(self._rows.values())

    def put_rows(self, rows: Sequence[Tensor]) -> None:
        """Write timed values that were ``rows`` at another call."""
        for own, row in zip(self._rows.values(), rows, strict=True):
            own.copy_(row)

    def fill(self, found: Sequence[Tensor]) -> None:
        """Write the timed values at all timesteps, [T, ...] each, to the tables."""
        for (dtype, start), values in zip(self._columns.values(), found, strict=True):
            self.tables[dtype][:, start : start + values[0].numel()].copy_(values.flatten(1))

    def take(self, row: int) -> None:
        """Bring the timed values of a known timestep."""
        for dtype, table in self.tables.items():
            self._rows[dtype].copy_(table[row])

    def look_up(self, timestep: Tensor) -> None:
        """Bring the timed values of a timestep, or of the nearest that is listed.

        Nothing waits for the device.
        """
        apart = distance(timestep.reshape(1, -1), self.timesteps[:, None]).amax(dim=1)
        row = apart.argmin()
        self.doubts.logical_or_(apart.amin() > 0)
        for dtype, table in self.tables.items():
            torch.index_select(table, 0, row[None], out=self._rows[dtype][None])


def distance(timestep: Tensor, listed: Tensor) -> Tensor:
    """How far apart timesteps are, beyond the rounding of the first one's dtype.

    bfloat16(t) / 1000 is not bfloat16(t / 1000).
    """
    rounding = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
    return (timestep.to(listed) - listed).abs() - rounding * listed.abs()
