"""Numbers of steps: sessions longer or shorter than the policy, calls beyond the last step."""

from __future__ import annotations

import contextlib

import pytest
from torch import nn

import toca_fx
from tests.helpers import make_inputs, run_all
from tests.system.runtime.generations import fast_twin, in_session, same, uncached
from toca_fx import PolicyError


def test_calls_beyond_the_last_step_are_full(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    fast, inputs = fast_twin(model), make_inputs(8)
    with toca_fx.session(num_steps=5) as run:
        outputs = run_all(fast, inputs)
    assert [step.kind for step in run.report().steps] == [
        "full",
        "partial",
        "partial",
        "full",
        "partial",
        "full",
        "full",
        "full",
    ]
    assert all(
        uncached(model, step, output)
        for step, output in list(zip(inputs, outputs, strict=True))[5:]
    )
    beyond = [
        warning for warning in run.report().warnings if "more often than the 5 steps" in warning
    ]
    assert len(beyond) == 1
    assert caplog.messages.count(f"toca_fx: {beyond[0]}") == 1


def test_another_number_of_steps_is_warned_of(model: nn.Module) -> None:
    fast = fast_twin(model, N={"base": 3, "drift": 0.4})
    with toca_fx.session(num_steps=20) as run:
        run_all(fast, make_inputs(20))
    assert run.report().warnings == (
        "policy `test` was tuned for 12 steps and runs 20: "
        "its slopes and windows are stretched over them",
    )
    with toca_fx.session(num_steps=12) as run:
        run_all(fast, make_inputs(12))
    assert run.report().warnings == ()


def test_a_session_that_ends_early_says_so(model: nn.Module) -> None:
    """As when a scheduler was asked for its timesteps before it knew the number of steps."""
    fast = fast_twin(model)
    with toca_fx.session(num_steps=1000) as run:
        run_all(fast, make_inputs(12))
    (warning,) = [warning for warning in run.report().warnings if "was planned for" in warning]
    assert "planned for 1000 steps and had 12" in warning
    stack = contextlib.ExitStack()
    run = stack.enter_context(toca_fx.session())
    run_all(fast, make_inputs(2))
    with pytest.raises(MemoryError), stack:
        raise MemoryError
    assert run.report().warnings == (), "what failed has other troubles"
    with toca_fx.session() as run:
        run_all(fast, make_inputs(2))
        run.close()
    assert run.report().warnings == (), "closed early on purpose"


@pytest.mark.parametrize("steps", [7, 12, 20])
def test_without_a_session_a_schedule_is_cached_from_its_second_run_on(
    model: nn.Module, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    fast, inputs, others = fast_twin(model), make_inputs(steps), make_inputs(steps, seed=1)
    for step, output in zip(inputs, run_all(fast, inputs), strict=True):
        assert uncached(model, step, output)
    first = [message for message in caplog.messages if message.startswith("toca_fx: nobody told")]
    assert len(first) == 1
    assert "began at timestep 999" in first[0]
    caplog.clear()
    assert same(run_all(fast, others), in_session(fast, others, steps))
    assert not [message for message in caplog.messages if "nobody told" in message]
    with toca_fx.session(steps) as run:
        run_all(fast, others)
    assert run.report().to_dict()["steps"][1]["kind"] == "partial"


def test_listed_steps_refuse_another_number_of_steps(model: nn.Module) -> None:
    fast = fast_twin(model, N={"full_steps": [0, 5]})
    with (
        pytest.raises(PolicyError, match="hold for its 12 steps only; this session has 20"),
        toca_fx.session(num_steps=20),
    ):
        run_all(fast, make_inputs(2))
    with toca_fx.session(num_steps=12) as run:
        run_all(fast, make_inputs(6))
    assert [step.kind for step in run.report().steps] == ["full", *["partial"] * 4, "full"]
