"""What a gate decides, of a signal that is given: threshold, bound, branches, and a lag."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor

from toca_fx.plan.plan import Plan, Settings, StepPlan
from toca_fx.policy import Gate as Said
from toca_fx.runtime.gate import Choice, Gate, SamplingRun, gate_of
from toca_fx.runtime.histories import Histories, Moment
from toca_fx.runtime.signals import Facts, Signal

PLAN = Plan((), (), (), Settings("test", 2, 0, False, False, 0, 0))
FACTS = Facts(None, None, Moment(0, None), Histories(PLAN, {}))

Values = Sequence[float | None]


class Given(Signal):
    """A signal whose values are given, step by step; it notes what it is told."""

    def __init__(self, values: Values) -> None:
        self.values, self.told = list(values), list[str]()

    def observe(self, facts: Facts) -> Tensor | None:
        value = self.values.pop(0)
        return None if value is None else torch.tensor(value)

    def begin(self, facts: Facts) -> None:
        self.told.append("begin")

    def end(self, facts: Facts, output: Tensor | None) -> None:
        self.told.append("end")

    def clear(self) -> None:
        self.told.append("clear")


class Latest(Given):
    """As a surprise: what was seen last, times the square of the distance."""

    def estimate(self, observed: Sequence[float], distance: int) -> float:
        return observed[-1] * distance**2


def run(
    gate: Gate, steps: int, forced: Iterable[int] = (), together: SamplingRun | None = None
) -> str:
    """The kinds of the steps, full or skipped; those ``forced`` are not asked for."""
    kinds, sampling = "", together or SamplingRun()
    for position in range(steps):
        gate.observe(FACTS)
        full = position in forced or sampling.choose(position, gate).full
        gate.begin(FACTS, full)
        gate.end(FACTS, full, None)
        kinds += "F" if full else "s"
    return kinds


def gate(values: Values, threshold: float, at_most: int | None = None, lags: bool = False) -> Gate:
    return Gate("given", Given(values), threshold, at_most, lags)


@pytest.mark.parametrize(
    ("values", "threshold", "at_most", "forced", "expected"),
    [
        ([0.0] * 8, 1.0, None, [0], "Fsssssss"),
        ([0.0] * 8, 1.0, 3, [0], "FsssFsss"),
        ([0.0] * 8, 1.0, 0, [0], "FFFFFFFF"),
        ([0.0] * 8, 1.0, 3, [0, 1, 7], "FFsssFsF"),
        ([0.5] * 8, 1.0, None, [0], "FsFsFsFs"),  # the sum starts anew at each full step
        ([0.4] * 8, 1.0, None, [0], "FssFssFs"),
        ([0.4] * 8, 1.0, None, [0, 2], "FsFssFss"),  # at one that is forced too
        ([2.0] * 8, 1.0, 3, [0], "FFFFFFFF"),
        ([1.0] * 4, 1.0, None, [0], "FFFF"),  # from the threshold on
        ([None, None, 0.4, 0.4, 0.4, 0.4], 1.0, None, [0], "FFssFs"),  # not measured: full
        ([0.0, 0.1, math.nan, 0.1, 0.1], 1.0, None, [0], "FsFss"),
        ([0.0, 0.1, math.inf, 0.1, 0.1], 1.0, None, [0], "FsFss"),
    ],
)
def test_decisions(
    values: Values, threshold: float, at_most: int | None, forced: list[int], expected: str
) -> None:
    assert run(gate(values, threshold, at_most), len(values), forced) == expected


@pytest.mark.parametrize(
    ("values", "threshold", "at_most", "forced", "expected"),
    [
        # Even changes are as they are known at once: a step is guessed to be as the last one.
        ([0.4] * 8, 1.0, None, [0], "FssFssFs"),
        ([0.5] * 8, 1.0, None, [0], "FsFsFsFs"),
        ([0.0] * 8, 1.0, 3, [0], "FsssFsss"),
        ([2.0] * 4, 1.0, None, [0], "FFFF"),
        # One that comes as a surprise is known a step later, and counts.
        ([0.1, 0.1, 0.1, 0.9, 0.1, 0.1], 1.0, None, [0], "FsssFs"),
        # What the first steps could not measure is not known one step longer.
        ([None, None, 0.4, 0.4, 0.4, 0.4], 1.0, None, [0], "FFFssF"),
    ],
)
def test_decisions_that_lag(
    values: Values, threshold: float, at_most: int | None, forced: list[int], expected: str
) -> None:
    assert run(gate(values, threshold, at_most, lags=True), len(values), forced) == expected


def test_a_lagging_gate_reads_nothing_of_the_step_itself() -> None:
    """Whatever is measured from a step on, what is decided there stays."""
    values = [0.3, 0.2, 0.5, 0.1, 0.7, 0.2, 0.4, 0.3, 0.2]
    whole = run(gate(values, 1.0, lags=True), 9, [0])
    assert {*whole} == {"F", "s"}
    for at in range(1, 9):
        other = [*values[:at], *[9.0] * (9 - at)]
        assert run(gate(other, 1.0, lags=True), at + 1, [0]) == whole[: at + 1]


@pytest.mark.parametrize(("lags", "expected"), [(False, "FssFssFs"), (True, "FssFssFs")])
def test_an_estimate_may_grow_with_the_distance(lags: bool, expected: str) -> None:
    found = Gate("given", Latest([0.2] * 8), 1.0, None, lags)
    assert run(found, 8, [0]) == expected


def test_signals_are_told_of_full_steps_and_of_what_is_forgotten() -> None:
    signal = Given([0.6] * 6)
    found = Gate("given", signal, 1.0, None, False)
    assert signal.told == ["clear"]
    assert run(found, 3, [0]) == "FsF"
    assert signal.told == ["clear", "begin", "end", "begin", "end"]
    found.clear()
    assert signal.told[-1] == "clear"
    # The next step counts none of those before.
    assert run(found, 2) == "sF"


def test_reasons_say_what_was_seen() -> None:
    sampling, found = SamplingRun(), gate([None, 0.25, 0.5, 0.125, 0.125], 0.5, 1)
    run(found, 5, [0], sampling)
    assert sampling.choices == {
        1: Choice(False, "given 0.25"),
        2: Choice(True, "at_most"),
        3: Choice(False, "given 0.125"),
        4: Choice(True, "at_most"),
    }
    assert gate([None], 0.5).choose() == Choice(True, "given not measured yet")


def test_the_branch_that_comes_first_decides() -> None:
    sampling = SamplingRun()
    first, second = gate([0.4] * 8, 1.0), gate([2.0] * 8, 1.0)
    assert run(first, 8, [0], sampling) == run(second, 8, [0], sampling) == "FssFssFs"
    sampling = SamplingRun()
    first, second = gate([0.4] * 8, 1.0), gate([2.0] * 8, 1.0)
    assert run(second, 8, [0], sampling) == run(first, 8, [0], sampling) == "FFFFFFFF"


def test_a_branch_that_follows_keeps_its_own_bound() -> None:
    """The first one had a full step more, for reasons of its own."""
    sampling = SamplingRun()
    first, second = gate([0.0] * 8, 1.0, 3), gate([0.0] * 8, 1.0, 3)
    assert run(first, 8, [0, 2], sampling) == "FsFsssFs"
    assert run(second, 8, [0], sampling) == "FsssFsFs"


def test_a_branch_may_begin_late() -> None:
    sampling = SamplingRun()
    first, second = gate([0.4] * 8, 1.0, 6), gate([0.0] * 4, 1.0, 6)
    assert run(first, 4, [0], sampling) == "FssF"
    for position in range(4, 8):  # the second one comes first from here on
        second.observe(FACTS)
        full = position == 4 or sampling.choose(position, second).full
        second.begin(FACTS, full)
        second.end(FACTS, full, None)
    assert [sampling.choices[at].full for at in (5, 6, 7)] == [False] * 3
    first.observe(FACTS)
    assert not sampling.choose(5, first).full


def test_a_plan_without_open_steps_has_no_gate() -> None:
    steps = (StepPlan(0, ("full",), (4,)), StepPlan(1, ("reuse",), (0,)))
    settings = Settings("test", 2, 0, False, False, 0, 0, gate=Said("sea", 0.1, 4))
    assert gate_of(Plan((), (), steps[:1], settings), False) is None
    assert gate_of(Plan((), (), steps, Settings("test", 2, 0, False, False, 0, 0)), False) is None
    assert gate_of(Plan((), (), steps, settings), False) is not None
