"""Sessions: what belongs to a generation, when a new one begins, and who sees which."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import KINDS, Inputs, call, make_inputs, make_policy, programs, run_all, tiny
from tests.marks import slow_but
from tests.system.runtime.generations import DEFAULT, Flaky, fast_twin, in_session, same, uncached
from toca_fx.runtime.context import current_session

# Explicit sessions


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_starts_afresh(kind: str) -> None:
    model = tiny(kind, layers=2)
    fast = fast_twin(model)
    first, second = make_inputs(seed=1), make_inputs(seed=2)
    with toca_fx.session() as run:
        run_all(fast, first)
    assert [step.kind for step in run.report().steps] == DEFAULT
    with toca_fx.session() as run:
        for number, step in enumerate(second):
            with torch.no_grad():
                output = call(fast, *step)
            assert uncached(model, step, output) == (number % 3 == 0)
            if number == 4:
                break
    assert [step.kind for step in run.report().steps] == DEFAULT[:5]


def test_calls_that_nothing_tells_apart_are_full(model: nn.Module) -> None:
    inputs = make_inputs()
    constant = Inputs(inputs.latents, torch.zeros(12, dtype=torch.int64), inputs.labels)
    fast = fast_twin(model)
    with toca_fx.session() as run:
        outputs = run_all(fast, constant)
    for step, output in zip(constant, outputs, strict=True):
        assert uncached(model, step, output)
    warning, *_ = run.report().warnings
    assert "two calls in a row had the same timestep" in warning
    with toca_fx.session(timesteps=[0.0] * 12) as run:  # told
        run_all(fast, constant)
    assert [step.kind for step in run.report().steps] == DEFAULT


@pytest.mark.parametrize("num_steps", [0, -3, True, 2.0, "50"])
def test_a_session_wants_a_number_of_calls(num_steps: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"expected a positive integer, the number of model calls"),
        toca_fx.session(num_steps=num_steps),
    ):
        pass


def test_nested_sessions(model: nn.Module) -> None:
    fast, inputs, other = fast_twin(model), make_inputs(seed=1), make_inputs(seed=2)
    alone, other_alone = in_session(fast, inputs), in_session(fast, other)
    outputs: list[Tensor] = []
    with toca_fx.session() as outer:
        for number, step in enumerate(inputs):
            with torch.no_grad():
                outputs.append(call(fast, *step))
            if number == 4:
                with toca_fx.session() as inner:
                    assert same(run_all(fast, other), other_alone)
                assert current_session() is outer.session
    assert same(outputs, alone)
    assert len(inner.report().steps) == len(outer.report().steps) == 12


def test_a_session_is_closed_on_an_exception(model: nn.Module) -> None:
    fast = fast_twin(model)
    before = current_session()
    runs = []

    def fail_in_a_session() -> None:
        with toca_fx.session() as run:
            runs.append(run)
            run_all(fast, make_inputs(4))
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_a_session()
    assert current_session() is before
    assert len(runs[0].report().steps) == 4
    inputs = make_inputs()
    assert uncached(model, next(iter(inputs)), in_session(fast, inputs)[0])


def test_the_caches_go_with_the_session(model: nn.Module) -> None:
    fast = fast_twin(model)
    with toca_fx.session() as run, torch.no_grad():
        run_all(fast, make_inputs(2))
        caches = [
            weakref.ref(cache)
            for generation in run.session.generations
            for cache in generation.storage.buffers.values()
        ]
        # Outputs; of the MLP also scores and which tokens were picked.
        assert len(caches) == 2 + 1 + 1
        assert all(cache() is not None for cache in caches)
    gc.collect()
    assert not any(cache() is not None for cache in caches)
    assert len(run.report().steps) == 2


def test_inference_mode_and_no_grad_give_the_same(model: nn.Module) -> None:
    fast, inputs = fast_twin(model), make_inputs()
    expected = in_session(fast, inputs)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with toca_fx.session() as run, mode():
            assert same([call(fast, *step) for step in inputs], expected)
        assert [step.kind for step in run.report().steps] == DEFAULT


# Implicit sessions


def test_a_new_generation_after_the_last_step(model: nn.Module) -> None:
    fast, inputs, other = fast_twin(model), make_inputs(seed=1), make_inputs(seed=2)
    expected = in_session(fast, inputs), in_session(fast, other)
    assert same(run_all(fast, inputs), expected[0])
    assert same(run_all(fast, other), expected[1])
    assert same(run_all(fast, inputs), expected[0])


def test_a_new_generation_after_the_last_step_whatever_the_timestep_says(model: nn.Module) -> None:
    fast, first, second = fast_twin(model), make_inputs(seed=1), make_inputs(seed=2)
    first = Inputs(first.latents, torch.arange(24).flip(0)[:12], first.labels)
    second = Inputs(second.latents, torch.arange(12).flip(0), second.labels)  # goes on falling
    expected = in_session(fast, second)
    run_all(fast, first)
    assert same(run_all(fast, second), expected)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_new_generation_when_the_timestep_turns_back(model: nn.Module, direction: str) -> None:
    fast, inputs = fast_twin(model), make_inputs()
    if direction == "up":
        inputs = Inputs(inputs.latents, inputs.timesteps.flip(0), inputs.labels)
    expected = in_session(fast, inputs)
    for stop in (5, 2, 8):
        with torch.no_grad():
            for number, step in zip(range(stop), inputs, strict=False):
                assert same([call(fast, *step)], [expected[number]])
    assert same(run_all(fast, inputs), expected)


def test_an_implicit_session_forgets_a_generation_that_failed(model: nn.Module) -> None:
    flaky = Flaky()
    fast = toca_fx.compile(model, make_policy(), inner=flaky)
    inputs = make_inputs()
    with torch.no_grad():
        for number, step in enumerate(inputs):
            flaky.fails = number == 4
            if flaky.fails:
                with pytest.raises(RuntimeError, match="out of luck"):
                    call(fast, *step)
            else:
                output = call(fast, *step)
            assert number != 5 or uncached(model, step, output)


# Failures and changes in the middle


@pytest.mark.parametrize("failing", slow_but([1], [0, 1, 3, 11], "one step is enough"))
def test_the_step_after_a_failure_is_full(model: nn.Module, failing: int) -> None:
    flaky = Flaky()
    fast = toca_fx.compile(model, make_policy(), inner=flaky)
    inputs = make_inputs()
    with toca_fx.session() as run, torch.no_grad():
        for number, step in enumerate(inputs):
            flaky.fails = number == failing
            if flaky.fails:
                with pytest.raises(RuntimeError, match="out of luck"):
                    call(fast, *step)
                flaky.fails = False
                output = call(fast, *step)
                assert uncached(model, step, output)
            else:
                output = call(fast, *step)
            assert not output.isnan().any()
    kinds = [*DEFAULT]
    kinds[failing] = "full"
    assert [step.kind for step in run.report().steps] == kinds


def test_a_call_that_dynamo_refuses_costs_nothing(model: nn.Module) -> None:
    fast, inputs = fast_twin(model), make_inputs()
    expected = in_session(fast, inputs)
    outputs = []
    with toca_fx.session(), torch.no_grad():
        for number, step in enumerate(inputs):
            if number == 4:
                with pytest.raises(Exception, match=r"(?s)shape|size"):
                    call(fast, step[0][:, :3], step[1], step[2])
            outputs.append(call(fast, *step))
    assert same(outputs, expected)


def change_batch(inputs: Inputs) -> Inputs:
    return make_inputs(len(inputs.timesteps), batch=3, seed=5)


def change_resolution(inputs: Inputs) -> Inputs:
    return make_inputs(len(inputs.timesteps), seed=5, side=8)


def change_dtype(inputs: Inputs) -> Inputs:
    return Inputs(inputs.latents.double(), inputs.timesteps, inputs.labels)


@pytest.mark.parametrize(
    "change",
    slow_but(
        [change_resolution],
        [change_batch, change_resolution, change_dtype],
        "of the changes, one is enough",
    ),
)
@pytest.mark.parametrize("explicit", [True, False])
def test_other_shapes_and_dtypes_in_the_middle(
    change: Callable[[Inputs], Inputs], explicit: bool
) -> None:
    model = tiny("diffusers", layers=2)
    fast = fast_twin(model)
    before, after = make_inputs(), change(make_inputs())
    kinds = []
    with toca_fx.session() if explicit else torch.no_grad() as run, torch.no_grad():
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            if number == 4 and change is change_dtype:
                fast.to(torch.float64)
            step = old if number < 4 else new
            kinds.append("full" if uncached(model, step, call(fast, *step)) else "partial")
    # The first step after the change is full, and a session's clock goes on. Outside of any nobody
    # knows how many steps there are.
    expected = [*DEFAULT[:4], "full", *DEFAULT[5:]] if explicit else ["full"] * 12
    assert kinds == expected
    if explicit:
        assert [step.kind for step in run.report().steps] == expected


def test_views_of_one_tensor_are_one_program(model: nn.Module) -> None:
    """Timesteps usually are views; once Dynamo made a batch symbolic it passes their storage
    offsets as inputs, too.
    """
    fast = fast_twin(model)
    for start, batch in ((0, 2), (1, 3)):
        longer = make_inputs(12 + start, batch=batch)
        inputs = Inputs(longer.latents[start:], longer.timesteps[start:], longer.labels)
        with toca_fx.session() as run:
            run_all(fast, inputs)
        assert [step.kind for step in run.report().steps] == DEFAULT
        assert run.report().compiled_graphs == 2
        assert len(programs(run)) == 1


def test_batches_of_many_sizes(model: nn.Module) -> None:
    """Dynamo makes the batch symbolic at the second size; each size has its own program."""
    fast = fast_twin(model)
    for batch in (2, 3, 4, 2, 1, 3):
        inputs = make_inputs(4, batch=batch, seed=batch)
        with toca_fx.session() as run:
            outputs = run_all(fast, inputs)
        assert [step.kind for step in run.report().steps] == DEFAULT[:4]
        assert uncached(model, list(inputs)[3], outputs[3])
        assert not uncached(model, list(inputs)[1], outputs[1])


# Gradients


def test_with_gradients_the_model_runs_uncached(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("original", layers=2).requires_grad_(True)
    fast, inputs = fast_twin(model), make_inputs(3)
    weight = model.blocks[1].mlp.fc1.weight
    with toca_fx.session() as run:
        for step in inputs:
            output = call(fast, *step)
            expected = call(model, *step)
            assert same([output], [expected])
            (gradient,) = torch.autograd.grad(output.square().sum(), weight)
            (other,) = torch.autograd.grad(expected.square().sum(), weight)
            assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-4)
            assert other.abs().max() > 1e-2
    assert run.report().steps == ()
    assert any(
        "gradients are enabled: the model runs uncached" in message for message in caplog.messages
    )
    with toca_fx.session() as run:
        run_all(fast, inputs)
    assert [step.kind for step in run.report().steps] == DEFAULT[:3]


def test_gradients_of_the_input_alone_count_too() -> None:
    model = tiny("original", layers=2)
    fast = fast_twin(model)
    x, t, y = next(iter(make_inputs()))
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(call(fast, x, t, y).sum(), x)
    (expected,) = torch.autograd.grad(call(model, x, t, y).sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-4)
