"""What was measured, as a file: each point is written as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tools.frontier.points import Point


@dataclass(frozen=True)
class Row:
    """A point and its measures; None: not measured, or the reference itself.

    ``steps`` counts the steps by kind. ``flops_ratio`` is the work of the users' own run over that
    of the point. PSNRs are in dB: to the users' own uncached run, to the uncached run of the same
    sampler and as many steps as that, to the converged run. ``frechet`` is the distance to the data
    over ``frechet_samples``. ``time`` is the share of the users' own run, ``seconds`` the time.
    """

    point: str
    policy: Mapping[str, Any] | None
    grid: list[float] | None
    steps: Mapping[str, int]
    flops_ratio: float
    psnr_own: float | None
    psnr_same: float | None
    psnr_converged: float | None
    frechet: float | None = None
    frechet_samples: int | None = None
    seconds: float | None = None
    time: float | None = None


class Results:
    """The rows of a file by the text of their points, and what they have in common.

    Raises:
        ValueError: the file has rows under other conditions.
    """

    def __init__(self, file: Path, conditions: Mapping[str, Any]) -> None:
        self.file, self.conditions = file, dict(conditions)
        self.rows: dict[str, Row] = {}
        self.notes: dict[str, Any] = {}
        self._read()

    def _read(self) -> None:
        if not self.file.exists():
            return
        found = json.loads(self.file.read_text(encoding="utf-8"))
        for key, value in self.conditions.items():
            if found["conditions"][key] != value:
                raise ValueError(
                    f"--out {self.file}: was measured with {key} = {found['conditions'][key]}, not "
                    f"{value}; give another file"
                )
        self.conditions, self.notes = found["conditions"], found["notes"]
        self.rows = {row["point"]: Row(**row) for row in found["rows"]}

    def row(self, point: Point) -> Row | None:
        """What is known of a point; None if its policy or grid was another."""
        row = self.rows.get(point.text)
        if row is None or (row.policy, row.grid) != (point.policy, point.grid):
            return None
        return row

    def put(self, row: Row, **measures: Any) -> Row:
        """Keep a row, with further measures of it; what others wrote meanwhile stays."""
        self._read()
        row = self.rows[row.point] = replace(row, **measures)
        self._write()
        return row

    def note(self, **notes: Any) -> None:
        """Keep what is said once for the file."""
        self._read()
        self.notes.update(notes)
        self._write()

    def _write(self) -> None:
        rows = [asdict(row) for row in self.rows.values()]
        says = {"conditions": self.conditions, "notes": self.notes, "rows": rows}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(says, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.file)
