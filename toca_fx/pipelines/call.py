"""One call of a pipeline: its runs, and a session for each model of each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from toca_fx.pipelines.scheduler import Timetable, numbers, position, timetable
from toca_fx.runtime.clock import Told
from toca_fx.runtime.context import told_session
from toca_fx.runtime.report import Recorded, Report, make_report
from toca_fx.runtime.runner import Runner
from toca_fx.runtime.session import Session
from toca_fx.runtime.units import Scheduled


@dataclass
class _Part:
    """The ``session`` of a model in a run, from step ``first`` on.

    ``seen`` of its calls have been taken over; ``runners`` ran them, one for each capture.
    """

    session: Session
    first: int
    seen: int = 0
    runners: set[Runner] = field(default_factory=set)

    def forget_timed_values(self) -> None:
        """Outside of a pipeline's calls nothing of ours is kept."""
        for runner in self.runners:
            runner.forget_timed_values()


@dataclass
class Call:
    """What a call of ``pipe`` has done so far.

    A run begins where its scheduler has other timesteps; the memories of the one before are given
    back then, and the rest when the call ends. Each model of a run has a session of its own, of the
    steps that are its. ``configs`` are those of the models, by the names of their components.
    """

    pipe: Any
    configs: Mapping[str, Any]
    notes: dict[str, None] = field(default_factory=dict)
    _table: Timetable | None = None
    _runs: int = 0
    _parts: dict[str, _Part] = field(default_factory=dict)
    _calls: list[Recorded] = field(default_factory=list)
    _warnings: dict[str, None] = field(default_factory=dict)
    _cache_bytes: int = 0
    _hoisted_bytes: int = 0

    @contextmanager
    def of_model(self, component: str) -> Iterator[None]:
        """A call of the model ``component``: it is in its session, and on the scheduler's step."""
        scheduler = getattr(self.pipe, "scheduler", None)
        found = timetable(scheduler) if self._is_new(scheduler) else self._table
        if found is None:  # nobody tells: as outside of any session
            yield
            return
        if found is not self._table:
            self._end_run()
            self._table, self._runs = found, self._runs + 1
        step = position(scheduler, found.begin)
        part = self._parts.get(component)
        if part is None:
            part = self._parts[component] = self._part(component, found, step)
        at = None if step is None else step - part.first
        steps = part.session.num_steps
        told = None if at is None or steps is None else Told(steps, position=max(at, 0))
        try:
            with told_session(part.session, told):
                yield
        finally:
            self._note(component, part)

    def close(self) -> None:
        """Give all memories back."""
        self._end_run()

    def report(self) -> Report:
        """The report on all runs of the call so far."""
        made = make_report(
            self._calls, self._cache_bytes, self._hoisted_bytes, tuple(self._warnings)
        )
        return replace(made, notes=tuple({**self.notes, **dict.fromkeys(made.notes)}))

    def _is_new(self, scheduler: Any) -> bool:
        """Whether the scheduler's timesteps were set since the run began."""
        own = getattr(scheduler, "timesteps", None)
        return self._table is None or own is not self._table.source

    def _part(self, component: str, table: Timetable, step: int | None) -> _Part:
        first, last = self._share(component, table, step)
        schedule = tuple((value,) for value in table.values[first:last])
        configs = (getattr(self.pipe.scheduler, "config", None), self.configs.get(component))
        scales = {scale for config in configs for scale in numbers(config)}
        words = Scheduled(sorted(scales), self._warnings, self.notes)
        session = Session(len(schedule), schedule, scheduled=words)
        return _Part(session, first)

    def _share(self, component: str, table: Timetable, step: int | None) -> tuple[int, int]:
        """The steps that are a model's: from the first up to the last, which is not among them.

        Of two experts the first one has those ahead of the pipeline's boundary. Otherwise a model
        has what is left of the run.
        """
        steps, at = len(table.values), step or 0
        ratio = getattr(getattr(self.pipe, "config", None), "boundary_ratio", None)
        trained = getattr(getattr(self.pipe.scheduler, "config", None), "num_train_timesteps", None)
        if ratio is not None and trained is not None and len(self.configs) > 1:
            ahead = sum(value >= ratio * trained for value in table.values)
            first, last = (0, ahead) if component == next(iter(self.configs)) else (ahead, steps)
            if step is None or first <= at < last:
                return first, last
        return (at if self._parts else 0), steps

    def _note(self, component: str, part: _Part) -> None:
        """Take over what the session has recorded, in the order of the calls."""
        new = part.session.calls[part.seen :]
        part.seen += len(new)
        self._calls += [
            (program, replace(record, component=component, run=self._runs - 1))
            for program, record in new
        ]
        held = [each.session.held_bytes for each in self._parts.values()]
        self._cache_bytes = max(self._cache_bytes, sum(caches for caches, _ in held))
        self._hoisted_bytes = max(self._hoisted_bytes, sum(hoisted for _, hoisted in held))
        known = part.session.generations
        part.runners.update(each.runner for each in known)
        if any(each.over for each in known):  # branches that end earlier do not come again
            for each in known:
                if each.progress.position < each.progress.num_steps - 1:
                    each.close()
        if all(each.storage is None for each in known):
            part.forget_timed_values()

    def _end_run(self) -> None:
        for part in self._parts.values():
            part.forget_timed_values()
            part.session.close()
        self._parts.clear()
        self._table = None
