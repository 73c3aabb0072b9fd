"""What the one line makes of a pipeline: equal where it has to be, cached where it may be."""

from __future__ import annotations

import gc
import logging
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import toca_fx
from toca_fx.runtime.report import Report, StepRecord
from toca_fx.runtime.storage import Storage
from toca_fx.runtime.timed_values import TimedValues
from tools.pipelines.case import Case
from tools.pipelines.check import tensors

STEPS, N, ENDS = 12, 3, 2

_POLICY = {
    "version": 1,
    "name": "pipelines",
    "sampler": {"steps": STEPS},
    "R": {"base": 0.5},
    "scores": {"staleness": 1.0},
}
EVERY = {**_POLICY, "N": {"base": 1}}
THIRD = {**_POLICY, "N": {"base": N, "first": ENDS, "last": ENDS}}


@dataclass
class Row:
    """What was measured of a case.

    ``calls`` are those of the models, ``plans`` what they did, by run, component and branch.
    ``exact`` says whether all steps in full give the untouched pipeline's image to the last bit,
    ``again`` whether a second cached image equals the first. ``flops`` is the factor by which work
    fell, ``decode_bytes`` and ``after_bytes`` what we held then (None: nothing was decoded),
    ``problem`` what refused it.
    """

    name: str
    calls: int = 0
    plans: dict[str, str] = field(default_factory=dict)
    exact: bool = False
    again: bool = False
    flops: float = 1.0
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    decode_bytes: int | None = None
    after_bytes: int = 0
    problem: str = ""

    @property
    def right(self) -> bool:
        """Whether there is nothing to say against it."""
        planned = all(plan == expected(len(plan)) for plan in self.plans.values())
        held = self.decode_bytes or self.after_bytes or self.warnings or self.problem
        return self.exact and self.again and bool(self.plans) and planned and not held

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def expected(steps: int) -> str:
    """The policy's plan for so many steps, F for a full step and p for any other."""
    full = {*range(ENDS), *range(ENDS - 1, steps, N), *range(steps - ENDS, steps)}
    return "".join("F" if step in full else "p" for step in range(steps))


def measured(case: Case) -> Row:
    """The row of a case."""
    row = Row(case.name)
    try:
        _measure(case, row)
    except Exception as error:
        logging.debug("%s", traceback.format_exc())
        row.problem = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    return row


def _measure(case: Case, row: Row) -> None:
    plain = _image(case, case.build())
    torch._dynamo.reset()
    full = toca_fx.compile(case.build(), EVERY, inner="eager")
    row.exact = _equal(_image(case, full), plain)
    torch._dynamo.reset()
    pipe = toca_fx.compile(case.build(), THIRD, inner="eager")
    with _logged() as said, _decoding(pipe, row):
        first = _image(case, pipe)
        report = toca_fx.last_report(pipe)
        second = _image(case, pipe)
    row.again = _equal(first, second) and all(each.isfinite().all() for each in first)
    if row.again and _equal(first, plain):
        row.again = False  # cached steps have to show
    row.calls, row.plans = len(report.steps), plans(report)
    row.flops, row.notes, row.warnings = report.flops_ratio, [*report.notes], said
    row.after_bytes = held_bytes()
    torch._dynamo.reset()


def plans(report: Report) -> dict[str, str]:
    """What the steps of each run, component and branch were: F full, p any other.

    ? is a step whose calls differ. Branches that nobody names are taken together: of those that are
    called at a step, all but one may begin later, and are full then, as nothing is kept yet.
    """
    found: dict[str, dict[int, list[StepRecord]]] = defaultdict(lambda: defaultdict(list))
    for step in report.steps:
        found[f"{step.run}/{step.component}/{step.branch}"][step.index].append(step)
    return {key: _plan([steps[at] for at in sorted(steps)]) for key, steps in found.items()}


def _plan(steps: Sequence[Sequence[StepRecord]]) -> str:
    """One letter for the calls of each step."""
    begun = [[call for call in calls if call.reason != "nothing kept"] for calls in steps]
    late = sum(len(calls) - len(kept) for calls, kept in zip(steps, begun, strict=True) if kept)
    if late >= max(map(len, steps)):  # more than begin: memories are lost again and again
        begun = [*map(list, steps)]
    kinds = [
        {"F" if call.kind == "full" else "p" for call in kept or calls}
        for kept, calls in zip(begun, steps, strict=True)
    ]
    return "".join(kind.pop() if len(kind) == 1 else "?" for kind in kinds)


def held_bytes() -> int:
    """The bytes of all memories and hoisted values that are alive."""
    return _held() and _held(collect=True)  # what nobody can reach holds nothing


def _held(collect: bool = False) -> int:
    if collect:
        gc.collect()
    kinds = (Storage, TimedValues)
    found = [each for each in gc.get_objects() if type(each) in kinds]
    return sum(each.total_bytes if type(each) is Storage else each._bytes for each in found)


def _image(case: Case, pipe: Any) -> list[Tensor]:
    return tensors(case.call(pipe, STEPS))


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@contextmanager
def _logged() -> Iterator[list[str]]:
    """What toca_fx warns of inside."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("toca_fx")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def _decoding(pipe: Any, row: Row) -> Iterator[None]:
    """Note what is held while the VAE decodes."""
    vae = getattr(pipe, "vae", None)
    if vae is None or not hasattr(vae, "decode"):
        yield
        return
    decode = vae.decode

    def watched(*args: Any, **kwargs: Any) -> Any:
        row.decode_bytes = max(row.decode_bytes or 0, held_bytes())
        return decode(*args, **kwargs)

    vae.decode = watched
    try:
        yield
    finally:
        del vae.decode
