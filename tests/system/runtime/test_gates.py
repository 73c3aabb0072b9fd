"""Generations whose full steps are decided as they come: which, with what result, and together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
import toca_fx.runtime.runner
from tests.helpers import make_policy, tiny
from tests.models import BrokenDiT, OriginalDiT
from tests.system.runtime.generations import Flaky
from toca_fx.lower.program import Program
from toca_fx.runtime.gate import gate_of

STEPS = 12
SAMPLER = {"steps": STEPS, "noise": "linear"}
TIMES = torch.linspace(500, 498.9, STEPS)  # near each other: the models are random
PACE = 0.2

# What a step does that is not full: nothing at all, on a forecast; or half of the tokens.
SKIPS = {"cache": {"grain": "output"}, "forecast": {"basis": "newton", "order": 1}}
TOKENS: dict[str, Any] = {}
# Thresholds that some steps are above, and some are not.
MIDDLE = {"easycache": 0.2, "first_block": 0.1, "sea": 0.4, "surprise": 0.3}
SIGNALS = tuple(MIDDLE)


def policy(signal: str = "easycache", threshold: float = 0.1, **sections: Any) -> Any:
    gate = {"signal": signal, "threshold": threshold, "at_most": 3}
    given = {"sampler": SAMPLER, "N": {"first": 2, "last": 1}, **SKIPS, "gate": gate}
    return make_policy(**{**given, **sections})


def constant(model: OriginalDiT) -> OriginalDiT:
    """The model, whose output is the same whatever it is given."""
    nn.init.zeros_(model.final_layer.linear.weight)
    return model


def small(seed: int = 0, **given: Any) -> OriginalDiT:
    """A model that predicts a small change of the latents, 4 channels each."""
    return tiny("original", layers=2, learn_sigma=False, **given).double()  # type: ignore[return-value]


def latents(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 16, 16, generator=generator, dtype=torch.float64)


def sample(
    model: Any,
    x: Tensor,
    pace: Callable[[Tensor], Tensor] | float = 0.02,
    label: int = 3,
    steps: range = range(STEPS),
) -> Tensor:
    """Euler's steps; ``pace`` is how far a step goes, or makes the next latents of those it has."""
    y = torch.full((len(x),), label)
    with torch.no_grad():
        for at in steps:
            found = model(x, t=TIMES[at].expand(len(x)), y=y)
            x = pace(x) if callable(pace) else x + pace * found
    return x


def noise(seed: int = 7) -> Callable[[Tensor], Tensor]:
    """A sampler that has other latents at every step."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def kinds(run: Any, branch: str | None = None) -> str:
    """The kinds of all calls, or of those of a branch: full, partial or skipped."""
    steps = run.report().steps
    return "".join(step.kind[0] for step in steps if branch in (None, step.branch))


def cached(found: str) -> int:
    return len(found) - found.count("f")


@pytest.mark.parametrize(
    ("signal", "does"),
    [*((each, SKIPS) for each in SIGNALS), ("easycache", TOKENS), ("sea", TOKENS)],
)
def test_what_does_not_change_takes_the_fewest_full_steps(
    signal: str, does: dict[str, Any]
) -> None:
    sections = {"cache": {}, "forecast": {}, **does}
    model = constant(small())
    fast = toca_fx.compile(model, policy(signal, **sections), inner="eager")
    with toca_fx.session(timesteps=TIMES) as run:
        # The latents move by a thousandth of what the model says: next to nothing.
        made = sample(fast, latents(), 1e-3)
    (program,) = {program for program, _ in run.session.calls}
    plan = program.analysis.plan(None)
    assert kinds(run) == "".join(step.kind[0] for step in plan.fewest)
    assert kinds(run).count("f") == plan.full_range[0] == 5
    assert cached(kinds(run)) == 7
    assert torch.allclose(made, sample(model, latents(), 1e-3), atol=1e-10)


@pytest.mark.parametrize("signal", SIGNALS)
def test_what_changes_at_every_step_is_computed_at_every_step(signal: str) -> None:
    fast = toca_fx.compile(small(), policy(signal), inner="eager")
    with toca_fx.session(timesteps=TIMES) as run:
        sample(fast, latents(), noise())
    assert kinds(run) == "f" * STEPS
    reasons = [step.reason for step in run.report().steps]
    assert reasons[:2] == ["planned", "planned"]
    assert reasons[-1] == "planned"
    assert all(reason.startswith(signal) for reason in reasons[2:-1])
    assert any(f"gate: {signal} was at 0.1 or more" in each for each in run.report().warnings)


def test_a_gate_that_never_opens_says_so_once_an_image(caplog: pytest.LogCaptureFixture) -> None:
    """Without a session too, and whatever the number of branches."""
    fast = toca_fx.compile(small(), policy("sea"), inner="eager")
    labels = torch.full((2,), 3), torch.full((2,), 7)

    def guided() -> None:
        wild = noise()
        with torch.no_grad():
            for t in TIMES:
                x = wild(latents())
                for y in labels:
                    fast(x, t=t.expand(2), y=y)

    guided()  # its schedule is seen for the first time
    for count in (1, 2):
        guided()
        said = [each for each in caplog.messages if "gate: sea was at 0.1 or more" in each]
        assert len(said) == count


@pytest.mark.parametrize("signal", SIGNALS)
def test_lower_thresholds_have_more_full_steps_and_smaller_errors(signal: str) -> None:
    model = small()
    expected = sample(model, latents(), PACE)
    counts, errors = [], []
    for threshold in (1e-6, MIDDLE[signal], 10.0):
        torch._dynamo.reset()
        fast = toca_fx.compile(model, policy(signal, threshold), inner="eager")
        with toca_fx.session(timesteps=TIMES) as run:
            errors.append((sample(fast, latents(), PACE) - expected).abs().max().item())
        counts.append(kinds(run).count("f"))
    assert counts[0] == STEPS > counts[1] > counts[2] == 5
    assert errors[0] < 1e-10 < errors[1] < errors[2]


def some(signal: str = "easycache") -> Any:
    """A policy under which some of the steps of ``sample(..., PACE)`` are full, and some not."""
    return policy(signal, MIDDLE[signal])


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_second_generation_decides_alike_and_compiles_nothing(signal: str) -> None:
    fast, found = toca_fx.compile(small(), some(signal), inner="eager"), []
    for _ in range(2):
        with toca_fx.session(timesteps=TIMES) as run:
            image = sample(fast, latents(), PACE)
        report = run.report()
        reasons = [step.reason for step in report.steps]
        found.append((kinds(run), reasons, image.tolist(), report.compiled_graphs))
    assert found[0] == found[1]
    assert 3 <= cached(found[0][0]) <= 6
    assert found[0][3] == 2
    assert all(reason for reason in found[0][1])


@pytest.mark.parametrize("told", ["session", "branches", "nothing"])
def test_branches_decide_together(told: str) -> None:
    """Each by itself would decide otherwise."""
    torch._dynamo.reset()
    model = small()
    fast = toca_fx.compile(model, some(), inner="eager")
    alone = []
    for label in (3, 7):
        with toca_fx.session(timesteps=TIMES) as run:
            sample(fast, latents(), PACE if label == 3 else 1.5, label)
        alone.append(kinds(run))
    assert alone[0] != alone[1]
    torch._dynamo.reset()
    fast = toca_fx.compile(model, some(), inner="eager")

    def guided(run: Any) -> list[Tensor]:
        x, y = latents(), latents()
        both = torch.full((2,), 3), torch.full((2,), 7)
        named = toca_fx.branch if told == "branches" else lambda _: contextlib.nullcontext()
        with torch.no_grad():
            for t in TIMES:
                with named("cond"):
                    x = x + PACE * fast(x, t=t.expand(2), y=both[0])
                with named("uncond"):
                    y = y + 1.5 * fast(y, t=t.expand(2), y=both[1])
        return [x, y]

    if told == "nothing":
        records: list[str] = []
        guided(None)  # its schedule is seen for the first time
        with recorded(records):
            guided(None)
        first, second = "".join(records[::2]), "".join(records[1::2])
    else:
        with toca_fx.session(timesteps=TIMES) as run:
            guided(run)
        first, second = kinds(run)[::2], kinds(run)[1::2]
    assert first == second == alone[0]  # that comes first
    assert cached(first) >= 3


@contextlib.contextmanager
def recorded(kinds: list[str]) -> Any:
    """Note the kind of every step, in no session too."""
    from toca_fx.runtime.generation import Generation

    run_step = Generation.run_step

    def noting(self: Generation, *args: Any) -> Any:
        found = run_step(self, *args)
        kinds.append(found[1].kind[0])
        return found

    Generation.run_step = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Generation.run_step = run_step  # type: ignore[method-assign]


def test_the_row_that_changes_most_decides() -> None:
    """A batch of one that would hardly move, and one that does."""
    model, found = small(), {}
    wild = noise()

    def pace(rows: Sequence[int]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.stack([wild(x[at]) if row else x[at] for at, row in enumerate(rows)])

    for rows in ((0, 0), (0, 1), (1, 0)):
        torch._dynamo.reset()
        fast = toca_fx.compile(model, policy("sea"), inner="eager")
        with toca_fx.session(timesteps=TIMES) as run:
            sample(fast, latents(), pace(rows))
        found[rows] = kinds(run)
    assert cached(found[0, 0]) == 7
    assert found[0, 1] == found[1, 0] == "f" * STEPS


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_failure_in_the_middle_forgets_what_was_measured(signal: str) -> None:
    """The call that is made again is full, and what follows is as if the run began with it."""
    model, flaky, at = small(), Flaky(), 5
    fast = toca_fx.compile(model, some(signal), inner=flaky)
    with toca_fx.session(timesteps=TIMES) as run:
        x = sample(fast, latents(), PACE, steps=range(at))
        flaky.fails = True
        with pytest.raises(RuntimeError, match="out of luck"):
            sample(fast, x, PACE, steps=range(at, at + 1))
        flaky.fails = False
        image = sample(fast, x, PACE, steps=range(at, STEPS))
    steps = run.report().steps
    assert len(steps) == STEPS
    assert (steps[at].kind, steps[at].reason) == ("full", "nothing kept")
    assert image.isfinite().all()
    # As the same run with all that comes before forgotten.
    torch._dynamo.reset()
    fast = toca_fx.compile(model, some(signal), inner="eager")
    with toca_fx.session(timesteps=TIMES) as again:
        y = sample(fast, latents(), PACE, steps=range(at))
        again.invalidate()
        expected = sample(fast, y, PACE, steps=range(at, STEPS))
    assert kinds(again) == kinds(run)
    assert cached(kinds(run)[at:]) >= 1
    assert torch.allclose(image, expected, atol=1e-12)


@pytest.mark.parametrize("signal", SIGNALS)
def test_what_is_read_late_decides_nearly_alike(
    signal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where the host does not wait for what it measures."""
    found = {}
    for lags in (False, True):
        torch._dynamo.reset()
        monkeypatch.setattr(
            toca_fx.runtime.runner, "gate_of", lambda plan, lags, late=lags: gate_of(plan, late)
        )
        fast = toca_fx.compile(small(), some(signal), inner="eager")
        images = []
        for _ in range(2):
            with toca_fx.session(timesteps=TIMES) as run:
                images.append(sample(fast, latents(), PACE))
        assert torch.equal(*images)
        found[lags] = kinds(run)
    assert cached(found[False]) >= 3
    assert abs(cached(found[True]) - cached(found[False])) <= 2
    assert cached(found[True]) >= 2


def test_the_first_block_is_run_ahead_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, added, seen = small(), [], []
    program_call = Program.first_block

    def call(self: Program, inputs: Sequence[Any]) -> Tensor:
        seen.append(program_call(self, inputs))
        return seen[-1]

    monkeypatch.setattr(Program, "first_block", call)
    fast = toca_fx.compile(model, policy("first_block", 10.0), inner="eager")
    x, y = latents(), torch.tensor([3, 3])
    with torch.no_grad(), toca_fx.session(timesteps=TIMES) as run:
        for at in range(STEPS):
            x = latents(seed=at)
            fast(x, t=TIMES[at].expand(2), y=y)
            block = model.blocks[0].register_forward_hook(
                lambda module, given, made: added.append(made - given[0])
            )
            model(x, t=TIMES[at].expand(2), y=y)
            block.remove()
    assert kinds(run).count("f") == 5
    assert cached(kinds(run)) == 7
    assert len(seen) == len(added) == STEPS
    for measured, expected in zip(seen, added, strict=True):
        assert torch.allclose(measured, expected, atol=1e-10)
    (program,) = {program for program, _ in run.session.calls}
    found = program.analysis
    share = found.first_block_flops / found.uncached_flops
    assert 0.3 < share < 0.6, "one block of two"
    spent = [step.beside_flops for step in run.report().steps]
    assert min(spent) >= found.first_block_flops
    assert found.gate_flops(found.plan(None)) == found.first_block_flops


def test_parts_of_a_broken_graph_follow_the_first() -> None:
    broken = BrokenDiT(learn_sigma=False).eval().requires_grad_(False).double()
    broken.load_state_dict(small().state_dict())
    tokens = policy("sea", MIDDLE["sea"], cache={}, forecast={})
    compiled = torch.compile(broken, backend="toca", options={"policy": tokens, "inner": "eager"})
    with toca_fx.session(timesteps=TIMES) as run:
        sample(compiled, latents(), PACE)
    found = kinds(run)
    assert len(found) == 2 * STEPS
    assert found[::2] == found[1::2]
    assert cached(found) >= 4


def test_a_report_says_why() -> None:
    fast = toca_fx.compile(small(), policy("easycache", 10.0), inner="eager")
    with toca_fx.session(timesteps=TIMES) as run:
        sample(fast, latents(), PACE)
    said = [(step["kind"], step["reason"]) for step in run.report().to_dict()["steps"]]
    assert said[:2] == [("full", "planned")] * 2
    assert said[5] == ("full", "at_most")
    kind, reason = said[2]
    assert kind == "skip"
    assert 0 < float(reason.removeprefix("easycache ")) < 10


def test_without_a_gate_all_that_is_planned_says_so() -> None:
    fast = toca_fx.compile(small(), make_policy(sampler=SAMPLER), inner="eager")
    with toca_fx.session(timesteps=TIMES) as run:
        sample(fast, latents(), PACE)
        run.invalidate()
    assert {step.reason for step in run.report().steps} == {"planned"}
    with toca_fx.session(timesteps=TIMES) as run:
        x = sample(fast, latents(), PACE, steps=range(2))
        run.invalidate()
        sample(fast, x, PACE, steps=range(2, STEPS))
    reasons = [step.reason for step in run.report().steps]
    assert (reasons[2], reasons[3]) == ("nothing kept", "planned")
    assert cached(kinds(run)) == 7


def test_latents_that_nobody_recognises_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A model of words has no input that is like its output."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 32)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)
            )

        def forward(self, ids: Tensor, t: Tensor) -> Tensor:
            x = self.words(ids) * t[:, None, None]
            for block in self.blocks:
                x = x + block(x)
            return x

    caplog.set_level(logging.WARNING, logger="toca_fx")
    torch.manual_seed(0)
    model = Words().requires_grad_(False)
    fast = toca_fx.compile(model, policy("easycache", cache={}, forecast={}), inner="eager")
    with toca_fx.session(timesteps=TIMES) as run, torch.no_grad():
        for t in TIMES:
            fast(torch.arange(16)[None], t=t.expand(1).float())
    assert kinds(run) == "f" * STEPS
    assert sum("easycache measures latents" in message for message in caplog.messages) == 1


def test_gates_keep_no_graph_of_their_own() -> None:
    """With gradients enabled, and in inference mode, as sampling loops run."""
    fast = toca_fx.compile(small().requires_grad_(False), some(), inner="eager")
    found = []
    for mode in (torch.inference_mode, torch.enable_grad):
        with toca_fx.session(timesteps=TIMES) as run, mode():
            x, y = latents(), torch.full((2,), 3)
            for t in TIMES:
                x = x + PACE * fast(x, t=t.expand(2), y=y)
        assert not x.requires_grad
        found.append(kinds(run))
    assert found[0] == found[1]
    assert cached(found[0]) >= 3
