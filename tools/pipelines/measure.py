"""What the one line makes of a pipeline: equal where it has to be, cached where it may be."""

from __future__ import annotations

import gc
import logging
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import toca_fx
from toca_fx import explain
from toca_fx.pipelines.twin import transformers_of
from toca_fx.runtime.report import Report, StepRecord
from toca_fx.runtime.storage import Storage
from toca_fx.runtime.timed_values import TimedValues
from tools.pipelines.case import Case, Change
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

    ``calls`` are those of the models, ``plans`` what they did, by run, component and branch, and
    for images before the last where they did otherwise. ``difference`` is how far the images of
    steps that are all full are from the untouched pipeline's (absolute; None: there are none),
    ``exact`` whether that is as near as the case asks for, ``again`` whether a second cached image
    equals the first. ``flops`` is the factor by which work fell, ``decode_bytes`` and
    ``after_bytes`` what we held then (None: nothing was decoded), ``moved_bytes`` what was brought
    in of weights that are away, ``told_bytes`` what explain says of that, ``problem`` what refused
    it.
    """

    name: str
    calls: int = 0
    plans: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    exact: bool = False
    again: bool = False
    flops: float = 1.0
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    decode_bytes: int | None = None
    after_bytes: int = 0
    moved_bytes: int = 0
    told_bytes: int = 0
    problem: str = ""

    @property
    def right(self) -> bool:
        """Whether there is nothing to say against it."""
        planned = all(plan == expected(len(plan)) for plan in self.plans.values())
        held = self.decode_bytes or self.after_bytes or self.warnings or self.problem
        told = self.moved_bytes == self.told_bytes
        return self.exact and self.again and bool(self.plans) and planned and told and not held

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
    untouched = case.build()
    plain = list(_images(case, untouched, case.changes))
    torch._dynamo.reset()
    full = toca_fx.compile(case.build(), EVERY, **case.options)
    row.difference = max(map(_distance, _images(case, full, case.changes), plain))
    row.exact = row.difference <= case.tolerance
    torch._dynamo.reset()
    pipe = toca_fx.compile(case.build(), THIRD, **case.options)
    images, reports = [], []
    with _logged() as row.warnings, _decoding(pipe, row):
        for image in _images(case, pipe, (*case.changes, _nothing)):
            images.append(image)
            reports.append(toca_fx.last_report(pipe))
    *_, first, second = images
    row.again = _equal(first, second) and all(each.isfinite().all() for each in first)
    if row.again and _equal(first, plain[-1]):
        row.again = False  # cached steps have to show
    *before, report = reports
    row.calls, row.plans = len(report.steps), plans(report)
    for number, other in enumerate(before):
        if plans(other) != row.plans:
            row.plans |= {f"{key} image {number + 1}": plan for key, plan in plans(other).items()}
    row.flops, row.notes = report.flops_ratio, [*report.notes]
    row.after_bytes, row.moved_bytes = held_bytes(), report.moved_bytes
    if row.moved_bytes:
        row.told_bytes = _told_bytes(case, untouched, report)
    torch._dynamo.reset()


def _told_bytes(case: Case, untouched: Any, report: Report) -> int:
    """What ``explain`` says of the weights that the calls of the report brought in."""
    models, inputs = transformers_of(untouched), dict[str, Any]()
    with ExitStack() as hooks:
        for name, model in models.items():
            note = partial(_note, inputs, name)
            hooks.enter_context(model.register_forward_pre_hook(note, with_kwargs=True))
        case.call(untouched, STEPS)
    told = 0
    calls = Counter((step.component, step.branch) for step in report.steps)
    for (name, _), count in calls.items():
        cached = "p" in expected(count)  # a policy that caches no step is an error
        policy = {**(THIRD if cached else EVERY), "sampler": {"steps": count}}
        told += sum(explain(models[name], policy, **inputs[name]).moved_bytes)
    return told


def _note(inputs: dict[str, Any], name: str, *call: Any) -> None:
    inputs.setdefault(name, call[-1])  # the keywords


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


def _images(case: Case, pipe: Any, changes: Iterable[Change]) -> Iterator[list[Tensor]]:
    """An image, and one more after each change."""
    given: dict[str, Any] = {}
    yield tensors(case.call(pipe, STEPS))
    for change in changes:
        given |= change(pipe) or {}
        yield tensors(case.call(pipe, STEPS, **given))


def _nothing(_: Any) -> None: ...


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    if _equal(one, other):
        return 0.0
    pairs = zip(one, other, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


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
