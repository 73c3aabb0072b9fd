"""Recorded steps, without a GPU: what stands in for a CUDA graph replays operators on the tensors
that they were recorded with.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import toca_fx
from tests.helpers import Call, call, capture, make_inputs, make_policy, program_of, run_all, tiny
from tests.marks import slow_but
from toca_fx.lower.compiler import Inner
from toca_fx.lower.cuda_graphs import Recordings
from toca_fx.plan.buffers import Buffer
from toca_fx.runtime.report import Report
from toca_fx.runtime.runner import Runner
from toca_fx.runtime.session import Session


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


CHANGING = {
    "R": {"base": 0.5, "step_weight": 0.9}
}  # another number of fresh tokens on every partial step


class Tape(TorchDispatchMode):
    """Operators in their order, with the very tensors that they read and wrote: what a CUDA graph
    knows of a step, and nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[at] if at < len(args) else kwargs[argument.name]
                self._before += [(tensor, tensor.clone()) for tensor in tree_leaves(written)]
        found = func(*args, **kwargs)
        if not any(
            alias.alias_info is not None and not alias.alias_info.is_write
            for alias in func._schema.returns
        ):
            self._calls.append((func, args, kwargs, found))  # views stay views
        return found

    def undo(self) -> None:
        """As if nothing had been run: what is recorded is not run."""
        for tensor, value in reversed(self._before):
            tensor.copy_(value)

    def replay(self) -> None:
        """Do it again, in the same memory."""
        for func, args, kwargs, found in self._calls:
            new = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, value in zip(tree_leaves(found), tree_leaves(new), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(value)


class TapeRecorder:
    """Records on tapes."""

    refusal = ""

    def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See ``toca_fx.lower.cuda_graphs.Recorder``."""
        tape = Tape()
        with tape:
            found = body()
        tape.undo()
        # What was computed while recording never was.
        tree_map_only(Tensor, lambda value: value.fill_(torch.nan), found)
        return tape.replay, found

    def exclusive(self, work: Callable[[], Any]) -> Any:
        """See ``toca_fx.lower.cuda_graphs.Recorder``."""
        return work()

    def mark(self) -> None:
        """See ``toca_fx.lower.cuda_graphs.Recorder``."""

    def after(self, mark: None) -> None:
        """See ``toca_fx.lower.cuda_graphs.Recorder``."""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: steps are recorded, and reading a tensor is to be avoided."""
    monkeypatch.setattr("toca_fx.runtime.runner.recorder_for", lambda device: TapeRecorder())
    monkeypatch.setattr("toca_fx.runtime.watch.reading_waits", lambda tensor: tensor.dim() > 0)
    monkeypatch.setattr(Inner, "records", property(lambda inner: None))


def generation(fast: nn.Module, inputs: Sequence[Call], told: bool) -> tuple[list[Tensor], Report]:
    known = [float(t.max()) for _, t, _ in inputs]
    with toca_fx.session(len(inputs), timesteps=known if told else None) as run:
        outputs = run_all(fast, inputs)
    return outputs, run.report()


def launches(report: Report) -> Counter[str]:
    return Counter(step.launch.how for step in report.steps)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "kind", slow_but(["diffusers"], ["diffusers", "original"], "one model is enough")
)
def test_recorded_generations_are_the_same_as_queued_ones(
    kind: str, told: bool, request: pytest.FixtureRequest
) -> None:
    model, policy = tiny(kind, layers=2).double(), make_policy(**CHANGING)
    seeds = [make_inputs(seed=seed, dtype=torch.float64) for seed in range(4)]
    expected = [
        generation(toca_fx.compile(model, policy, inner="eager"), list(inputs), told)[0]
        for inputs in seeds
    ]
    torch._dynamo.reset()
    request.getfixturevalue("recorded")
    fast = toca_fx.compile(model, policy, inner="eager")
    counts = []
    for inputs, right in zip(seeds, expected, strict=True):
        outputs, report = generation(fast, list(inputs), told)
        assert same(outputs, right)
        assert [step.kind for step in report.steps].count("partial") == 8
        assert not report.warnings
        counts.append(launches(report))
    # Each step is seen first, then recorded and replayed; only full steps come more than once in a
    # generation.
    assert counts[0] == {"queued": 9, "recorded": 3} or counts[0] == {"queued": 10, "recorded": 2}
    assert [count["recorded"] for count in counts[1:]] == [12, 12, 12]


FORECASTS: list[dict[str, Any]] = [
    CHANGING,
    {"cache": {"grain": "model"}},
    {"cache": {"grain": "output"}},
    {"skip": "alternate"},
]


@pytest.mark.parametrize(
    ("sections", "told"),
    slow_but(
        [(sections, at % 2 == 0) for at, sections in enumerate(FORECASTS)],
        itertools.product(FORECASTS, (True, False)),
        "each forecast in one way to tell",
    ),
)
def test_recorded_forecasts_are_the_same_as_queued_ones(
    sections: dict[str, Any], told: bool, request: pytest.FixtureRequest
) -> None:
    """Which tensor of a history is written and read changes from step to step, and comes again at
    the same step of the next generation.
    """
    policy = make_policy(**sections, forecast={"basis": "newton", "order": 2})
    model = tiny("original", layers=2).double()
    seeds = [list(make_inputs(seed=seed, dtype=torch.float64)) for seed in range(4)]
    plain = toca_fx.compile(model, policy, inner="eager")
    expected = [generation(plain, inputs, told)[0] for inputs in seeds]
    torch._dynamo.reset()
    request.getfixturevalue("recorded")
    fast = toca_fx.compile(model, policy, inner="eager")
    counts = []
    for inputs, right in zip(seeds, expected, strict=True):
        outputs, report = generation(fast, inputs, told)
        assert same(outputs, right)
        assert not report.warnings
        counts.append(launches(report)["recorded"])
    assert counts[1:] == [12, 12, 12]


@pytest.mark.usefixtures("recorded")
def test_the_report_says_what_was_recorded_and_why_not() -> None:
    fast = toca_fx.compile(tiny("original", layers=2), make_policy(**CHANGING), inner="eager")
    generation(fast, list(make_inputs()), True)
    _, report = generation(fast, list(make_inputs()), True)
    assert report.launches == {"full": {"recorded": 4}, "partial": {"recorded": 8}}
    assert "launches   partial: 8 recorded" in str(report)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        (
            {"recording": {"memory": 0}},
            "queued: 0 MiB of memories, and recorded steps keep 0 at most (recording.memory)",
        ),
        ({"scores": {"random": 1.0}}, "queued: scores.random draws numbers"),
    ],
)
def test_what_is_not_recorded_is_queued(sections: dict[str, Any], reason: str) -> None:
    model, inputs = tiny("original", layers=2), list(make_inputs())
    fast = toca_fx.compile(model, make_policy(**sections), inner="eager")
    for _ in range(2):
        _, report = generation(fast, inputs, True)
        assert report.launches == {"full": {reason: 4}, "partial": {reason: 8}}


@pytest.mark.usefixtures("recorded")
def test_parameters_that_move_are_not_read_where_they_were() -> None:
    model, policy, inputs = tiny("original", layers=2), make_policy(), list(make_inputs())
    fast = toca_fx.compile(model, policy, inner="eager")
    expected, _ = generation(fast, inputs, True)
    for moves in range(4):
        generation(fast, inputs, True)
        for parameter in model.parameters():
            old, parameter.data = parameter.data, parameter.data.clone()  # as offloading does
            old.fill_(torch.nan)
        outputs, report = generation(fast, inputs, True)
        assert same(outputs, expected), moves
    assert report.launches["partial"] == {"queued: parameters move between calls": 8}


@pytest.mark.usefixtures("recorded")
def test_a_short_schedule_is_recorded_too() -> None:
    """No step of it comes twice in a generation."""
    policy = make_policy(
        sampler={"steps": 4}, N={"base": 3, "first": 2}, R={"base": 0.5, "step_weight": 0.9}
    )
    fast, inputs = (
        toca_fx.compile(tiny("original", layers=2), policy, inner="eager"),
        list(make_inputs(4)),
    )
    counts = [launches(generation(fast, inputs, True)[1])["recorded"] for _ in range(3)]
    assert counts == [0, 4, 4]


@pytest.mark.usefixtures("recorded")
def test_calls_beyond_the_list_are_computed() -> None:
    model, inputs = tiny("original", layers=2).double(), list(make_inputs(14, dtype=torch.float64))
    fast = toca_fx.compile(model, make_policy(), inner="eager")
    for _ in range(3):
        with toca_fx.session(timesteps=[float(t.max()) for _, t, _ in inputs[:12]]) as run:
            outputs = run_all(fast, inputs)
        beyond = [step.kind for step in run.report().steps[12:]]
    assert beyond == ["full", "full"]
    for output, step in zip(outputs[12:], inputs[12:], strict=True):
        assert (output - call(model, *step)).abs().max() < 1e-10


@pytest.mark.slow(reason="many generations")
@pytest.mark.usefixtures("recorded")
def test_generations_of_another_length_take_the_place_of_idle_ones() -> None:
    model, inputs = tiny("original", layers=2), list(make_inputs())
    fast = toca_fx.compile(model, make_policy(), inner="eager")
    generation(fast, inputs, True)
    _, report = generation(fast, inputs, True)
    small = report.cache_bytes + report.hoisted_bytes
    torch._dynamo.reset()
    fast = toca_fx.compile(
        tiny("original", layers=40),
        make_policy(recording={"memory": 1 + small * 20 // 2**20}),
        inner="eager",
    )
    for steps in (12, 11, 12):
        for _ in range(3):
            _, report = generation(fast, list(make_inputs(steps)), True)
        assert launches(report)["recorded"] == steps


@pytest.mark.usefixtures("recorded")
def test_outputs_outlive_the_next_step() -> None:
    fast, inputs = (
        toca_fx.compile(tiny("original", layers=2), make_policy(), inner="eager"),
        list(make_inputs()),
    )
    generation(fast, inputs, False)
    generation(fast, inputs, False)
    with toca_fx.session() as run, torch.no_grad():
        kept = [call(fast, *step) for step in inputs]
    copies, _ = generation(fast, inputs, False)
    assert launches(run.report())["recorded"] == 12
    assert same(kept, copies)


@pytest.mark.usefixtures("recorded")
def test_generations_side_by_side_have_storage_of_their_own() -> None:
    x, t, y = next(iter(make_inputs(1)))
    captured, inputs = capture(tiny("diffusers", layers=2), x, timestep=t, class_labels=y)
    runner = Runner(program_of(captured, inputs, make_policy()), inputs)
    plan = runner.program.analysis.plan(None)
    first, second = runner.acquire(plan, 0), runner.acquire(plan, 0)
    assert (
        first.buffers[Buffer("cache", 0)].data_ptr()
        != second.buffers[Buffer("cache", 0)].data_ptr()
    )
    for storage in (first, second):
        assert storage.recordings is not None
        for _ in range(2):
            storage.recordings.run("kind", "key", lambda inputs: (inputs[0],), inputs)
    first.buffers[Buffer("score", 1)].fill_(7)
    runner.release(first)
    third = runner.acquire(plan, 0)
    assert third is first
    assert not third.buffers[Buffer("score", 1)].any(), "as good as new"
    runner.release(second)
    assert runner.acquire(plan, 0) is second


def test_without_recordings_memory_is_given_free() -> None:
    x, t, y = next(iter(make_inputs(1)))
    captured, inputs = capture(tiny("diffusers", layers=2), x, timestep=t, class_labels=y)
    runner = Runner(program_of(captured, inputs, make_policy()), inputs)
    plan = runner.program.analysis.plan(None)
    first = runner.acquire(plan, 0)
    assert first.recordings is None
    runner.release(first)
    assert runner.acquire(plan, 0) is not first


def test_what_cannot_be_recorded_is_queued_and_told(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(TapeRecorder):
        def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    recordings = Recordings(Refusing(), [], [0], set())
    for _ in range(3):
        found, reason = recordings.run("kind", "key", lambda inputs: inputs[0] + 1, [torch.ones(2)])
        assert found.tolist() == [2, 2]
    assert (
        reason == "a step could not be recorded: operation not permitted when stream is capturing"
    )
    assert len(caplog.messages) == 1


def test_inputs_keep_their_strides() -> None:
    """A timestep expanded over the batch lies in memory once; latents may be a part of
    something.
    """
    recordings, seen = Recordings(TapeRecorder(), [], [0, 1], set()), []

    def body(inputs: Sequence[Any]) -> Tensor:
        seen.append([value.stride() for value in inputs])
        return inputs[0][:, None] + inputs[1]

    for step in range(4):
        t, x = torch.tensor([float(step)]).expand(3), torch.arange(24.0).view(3, 8)[:, ::2]
        found, reason = recordings.run("kind", "key", body, [t, x])
        assert torch.equal(found, t[:, None] + x)
    assert not reason
    assert seen == [[(0,), (8, 2)]] * 2


def test_a_recording_serves_every_mode() -> None:
    class Trusting(TapeRecorder):
        def record(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            return lambda: None, body()

    recordings = Recordings(Trusting(), [], [0], set())
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found, reason = recordings.run(
                "kind", "key", lambda inputs: inputs[0].view(-1), [torch.ones(2)]
            )
        assert found.tolist() == [1, 1]
    assert not reason


class NoReading(TorchDispatchMode):
    """No number may be read out of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("told", [True, False])
def test_nothing_is_read_after_the_first_generation(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, inputs = (
        toca_fx.compile(tiny("original", layers=2), make_policy(), inner="eager"),
        list(make_inputs()),
    )
    expected, _ = generation(fast, inputs, told)
    step = Session.call

    def unread(self: Session, *args: Any) -> Any:
        with NoReading():
            return step(self, *args)

    monkeypatch.setattr(Session, "call", unread)
    for _ in range(2):
        outputs, report = generation(fast, inputs, told)
        assert same(outputs, expected)
    assert launches(report)["recorded"] == 12
    with NoReading(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        float(torch.ones(1))
