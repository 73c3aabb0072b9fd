"""Ctrl-C anywhere in a call: it was not made, or its memories are lost, and nothing is stuck."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import Call, call, make_inputs, make_policy
from tests.marks import slow_but
from tests.models import OriginalDiT
from tests.system.runtime.generations import fast_twin, same
from toca_fx.capture.updates import Updates

PACKAGE = str(Path(toca_fx.__file__).parent)
STEPS = 6
AT = {"the first step": 0, "a partial step": 1, "a full step": 3, "the last step": 5}


class Interrupt:
    """Ctrl-C at the ``number``-th line of toca_fx that runs, counted from 0; -1 only counts."""

    def __init__(self, number: int) -> None:
        self.number, self.lines, self.where = number, 0, ""

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines - 1 == self.number:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def image(
    fast: nn.Module,
    steps: list[Call],
    told: bool,
    at: int = -1,
    interrupt: Interrupt | None = None,
    lost: Sequence[int] = (),
) -> list[Tensor]:
    """A run; the call ``at`` is interrupted, and made again. At the steps ``lost``, what the
    memories hold is not to be read.
    """
    outputs = []
    session = toca_fx.session(STEPS) if told else contextlib.nullcontext()
    with torch.no_grad(), session as run:
        for number, step in enumerate(steps):
            if number in lost:
                run.invalidate()
            if number == at and interrupt is not None:
                with contextlib.suppress(KeyboardInterrupt), interrupt.armed():
                    call(fast, *step)
            outputs.append(call(fast, *step).clone())
    return outputs


def in_another_thread(work: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """What it gives; None if it does not come to an end. No lock is that thread's own."""
    found: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(60)
    return found[0] if found else None


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("when", slow_but(["a partial step"], list(AT), "one step is enough"))
@pytest.mark.parametrize("stride", slow_but([11], [1, 11], "every eleventh line is enough"))
def test_an_interrupted_call_was_not_made_or_its_memories_are_lost(
    model: nn.Module, when: str, told: bool, stride: int
) -> None:
    fast, steps, at = fast_twin(model), list(make_inputs(STEPS)), AT[when]
    image(fast, steps, told)  # the schedule is known from here on
    alone = image(fast, steps, told)
    with torch.no_grad():
        uncached = [call(model, *step) for step in steps]
    # If it was made, the next call is another of its step, and neither is trusted.
    allowed = [alone, *(image(fast, steps, True, lost=(at, at + 1)[:few]) for few in (1, 2))]
    counted = Interrupt(-1)
    image(fast, steps, told, at, counted)
    assert counted.lines > 150
    cached = 0
    for number in range(0, counted.lines, stride):
        interrupt = Interrupt(number)
        found = image(fast, steps, told, at, interrupt)
        if not any(same(found, expected) for expected in allowed):
            off = [not same([a], [b]) for a, b in zip(found, uncached, strict=True)]
            raise AssertionError(f"{interrupt.where}, line {number}: cached {off}")
        cached += sum(not same([a], [b]) for a, b in zip(found, uncached, strict=True))
        later = in_another_thread(lambda: image(fast, steps, told))
        assert later is not None, f"{interrupt.where}: another thread waits for ever"
        assert same(later, alone), f"{interrupt.where}: later"
    assert cached >= 2 * len(range(0, counted.lines, stride)), "the rest of the run is cached"


class Timeless(nn.Module):
    """A model that is not told of the time: a call that was not made looks like any other.

    It counts its calls, which is done behind the step. Its graph may break.
    """

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dit, self.breaks = OriginalDiT(depth=2).double(), breaks
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        tokens, c = self.dit.x_embedder(x) + self.dit.pos_embed, self.dit.y_embedder(y)
        tokens = self.dit.blocks[0](tokens, c)
        if self.breaks:
            torch._dynamo.graph_break()
        tokens = self.dit.blocks[1](tokens, c)
        return self.dit.unpatchify(self.dit.final_layer(tokens, c))


@pytest.mark.parametrize("breaks", [False, True])
def test_a_call_that_failed_behind_its_step_was_not_made(
    breaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model keeps is written then, and further parts of a broken graph run."""
    model = Timeless(breaks).eval().requires_grad_(False)
    options = {"policy": make_policy(sampler={"steps": STEPS}), "inner": "eager"}
    fast = torch.compile(model, backend="toca", options=options)
    x, _, y = next(iter(make_inputs(1, dtype=torch.float64)))
    inputs = torch.randn(STEPS, *x.shape, dtype=torch.float64) + x
    updates = Updates.apply
    fails = [False]

    def apply(self: Updates, inputs: Sequence[Any]) -> None:
        if fails[0] and (self.values is not None or breaks):
            fails[0] = breaks and self.values is not None  # the first of the parts counts calls
            if not fails[0]:
                raise KeyboardInterrupt
        updates(self, inputs)

    monkeypatch.setattr(Updates, "apply", apply)

    def run(at: int = -1, lost: int = -1) -> list[Tensor]:
        outputs = []
        with torch.no_grad(), toca_fx.session(STEPS) as session:
            for number, each in enumerate(inputs):
                if number == lost:
                    session.invalidate()
                if number == at:
                    fails[0] = True
                    with pytest.raises(KeyboardInterrupt):
                        fast(each, y)
                outputs.append(fast(each, y).clone())
        return outputs

    with torch.no_grad():
        uncached = [model(each, y) for each in inputs]
    for at in range(STEPS):
        found, expected = run(at), run(lost=at)
        assert same(found, expected), f"step {at}"
        cached = sum(not same([a], [b]) for a, b in zip(found, uncached, strict=True))
        assert cached >= 3


def test_a_first_call_that_failed_behind_its_step_starts_no_run(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was at the third timestep of a list, as from the middle of an image."""
    fast, steps = fast_twin(model), list(make_inputs(STEPS))
    timesteps = torch.stack([t for _, t, _ in steps])
    fails = [True]
    updates = Updates.apply

    def apply(self: Updates, inputs: Sequence[Any]) -> None:
        if fails.pop() if fails else False:
            raise KeyboardInterrupt
        updates(self, inputs)

    monkeypatch.setattr(Updates, "apply", apply)
    with torch.no_grad(), toca_fx.session(timesteps=timesteps) as run:
        with pytest.raises(KeyboardInterrupt):
            call(fast, *steps[2])
        for step in steps:
            call(fast, *step)
    kinds = [step.kind for step in run.report().steps[1:]]
    assert kinds == ["full", "partial", "partial"] * 2
    assert not any("list" in warning for warning in run.report().warnings)
