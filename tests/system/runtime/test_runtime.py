"""Sessions: what belongs to a generation, when a new one begins, and who sees which."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import toca_fx
from tests.helpers import KINDS, Inputs, call, make_inputs, make_policy, programs, run_all, tiny
from tests.marks import slow_but
from toca_fx import PolicyError
from toca_fx.runtime.session import current_session

DEFAULT = ["full", "partial", "partial"] * 4


@pytest.fixture(autouse=True)
def _fresh_implicit_session() -> Iterator[None]:
    current_session().close()
    yield
    current_session().close()


@pytest.fixture
def model() -> nn.Module:
    return tiny("diffusers", layers=2)


def fast_twin(model: nn.Module, **sections: Any) -> nn.Module:
    return toca_fx.compile(model, make_policy(**sections), inner="eager")


def in_session(fast: nn.Module, inputs: Inputs, num_steps: int | None = None) -> list[Tensor]:
    with toca_fx.session(num_steps=num_steps):
        return run_all(fast, inputs)


def same(left: Sequence[Tensor], right: Sequence[Tensor], tolerance: float = 1e-4) -> bool:
    return all((a - b).abs().max() <= tolerance for a, b in zip(left, right, strict=True))


def uncached(model: nn.Module, step: tuple[Tensor, Tensor, Tensor], output: Tensor) -> bool:
    """Whether ``output`` is what the model gives by itself (a partial step is off by 1e-1 and
    more).
    """
    with torch.no_grad():
        return same([call(model, *step)], [output])


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


def test_the_clock_counts_calls_not_timesteps(model: nn.Module) -> None:
    inputs = make_inputs()
    constant = Inputs(inputs.latents, torch.zeros(12, dtype=torch.int64), inputs.labels)
    fast = fast_twin(model)
    with toca_fx.session() as run:
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
                assert current_session() is outer
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
            for generation in run.generations
            for cache in generation.storage.buffers.values()
        ]
        assert (
            len(caches) == 4 + 2 + 2
        )  # outputs; of the MLPs also scores and which tokens were picked
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


class Flaky:
    """An inner backend whose graphs write rubbish into their buffers and fail when told to."""

    def __init__(self) -> None:
        self.fails = False

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self.fails:
                for value in args:
                    if isinstance(value, Tensor) and value.shape == (2, 64, 32):  # caches
                        value.fill_(torch.nan)
                raise RuntimeError("out of luck")
            return graph(*args)

        return run


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
    # The first step after the change is full; an explicit clock then goes on, an implicit one
    # starts anew.
    expected = [*DEFAULT[:4], "full", *DEFAULT[5:]] if explicit else [*DEFAULT[:4], *DEFAULT[:8]]
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


# Threads, tasks, models, branches


def test_threads_have_sessions_of_their_own(model: nn.Module) -> None:
    fast = fast_twin(model)
    inputs = [make_inputs(seed=seed) for seed in range(2)]
    expected = [in_session(fast, each) for each in inputs]
    outputs: list[list[Tensor]] = [[], []]
    barrier = threading.Barrier(2, timeout=60)

    def generate(which: int) -> None:
        with toca_fx.session(), torch.no_grad():
            for step in inputs[which]:
                barrier.wait()
                outputs[which].append(call(fast, *step))

    threads = [threading.Thread(target=generate, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(outputs[0], expected[0])
    assert same(outputs[1], expected[1])


def test_threads_have_implicit_sessions_of_their_own(model: nn.Module) -> None:
    fast, inputs = fast_twin(model), make_inputs()
    expected = in_session(fast, inputs)
    outputs: list[Tensor] = []
    with torch.no_grad():
        for step in list(inputs)[:5]:
            call(fast, *step)
    thread = threading.Thread(target=lambda: outputs.extend(run_all(fast, inputs)))
    thread.start()
    thread.join()
    assert same(outputs, expected)
    with torch.no_grad():
        assert same([call(fast, *list(inputs)[5])], [expected[5]]), (
            "the first thread's generation goes on"
        )


@pytest.mark.parametrize("explicit", [True, False])
def test_tasks_have_sessions_of_their_own(model: nn.Module, explicit: bool) -> None:
    fast = fast_twin(model)
    inputs = [make_inputs(seed=seed) for seed in range(3)]
    expected = [in_session(fast, each) for each in inputs]

    async def generate(own: Inputs) -> list[Tensor]:
        outputs = []
        with toca_fx.session() if explicit else nullcontext():
            for step in own:
                with torch.no_grad():
                    outputs.append(call(fast, *step))
                await asyncio.sleep(0)
        return outputs

    async def together() -> list[list[Tensor]]:
        with torch.no_grad():
            call(
                fast, *next(iter(inputs[0]))
            )  # the parent has an implicit session of its own, which nobody inherits
        return await asyncio.gather(*(generate(each) for each in inputs))

    for outputs, alone in zip(asyncio.run(together()), expected, strict=True):
        assert same(outputs, alone)


@pytest.mark.parametrize("name", ["", None, ["cond"], 3])
def test_a_branch_wants_a_name(name: Any) -> None:
    with pytest.raises(ValueError, match="non-empty name"), toca_fx.branch(name):
        pass


def test_models_in_one_session_have_clocks_of_their_own() -> None:
    models = [tiny("diffusers", layers=2, seed=seed) for seed in range(2)]
    fast = [fast_twin(model) for model in models]
    inputs = [make_inputs(seed=seed) for seed in range(2)]
    expected = [in_session(*pair) for pair in zip(fast, inputs, strict=True)]
    with toca_fx.session() as run, torch.no_grad():
        for number, steps in enumerate(zip(*inputs, strict=True)):
            for which in range(2):
                assert same([call(fast[which], *steps[which])], [expected[which][number]])
    assert [step.kind for step in run.report().steps] == [
        kind for kind in DEFAULT for _ in range(2)
    ]


def test_twins_of_one_model_with_other_policies_have_clocks_of_their_own(model: nn.Module) -> None:
    fast = [fast_twin(model), fast_twin(model, N={"base": 4}, R={"base": 0.8})]
    inputs = make_inputs()
    expected = [in_session(twin, inputs) for twin in fast]
    with toca_fx.session(), torch.no_grad():
        for number, step in enumerate(inputs):
            for which in range(2):
                assert same([call(fast[which], *step)], [expected[which][number]]), (number, which)


def test_branches_equal_runs_apart(model: nn.Module) -> None:
    fast = fast_twin(model)
    cond, uncond = make_inputs(seed=1), make_inputs(seed=2)
    expected = in_session(fast, cond), in_session(fast, uncond)
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    with toca_fx.session() as run, torch.no_grad():
        for one, other in zip(cond, uncond, strict=True):
            with toca_fx.branch("cond"):
                outputs[0].append(call(fast, *one))
            with toca_fx.branch("uncond"):
                outputs[1].append(call(fast, *other))
    assert same(outputs[0], expected[0])
    assert same(outputs[1], expected[1])
    report = run.report()
    assert [step.branch for step in report.steps] == ["cond", "uncond"] * 12
    assert report.warnings == ()


@pytest.mark.parametrize("explicit", [True, False])
def test_separate_guidance_needs_no_branch(model: nn.Module, explicit: bool) -> None:
    cond, uncond = make_inputs(seed=1), make_inputs(seed=2)
    plain = fast_twin(model)
    expected = in_session(plain, cond), in_session(plain, uncond)
    fast = fast_twin(model, guidance={"layout": "separate"})
    with toca_fx.session() if explicit else torch.no_grad(), torch.no_grad():
        for _ in range(1 if explicit else 2):
            for number, (one, other) in enumerate(zip(cond, uncond, strict=True)):
                assert same(
                    [call(fast, *one), call(fast, *other)],
                    [expected[0][number], expected[1][number]],
                ), number


def test_branches_of_the_implicit_session(model: nn.Module) -> None:
    fast, cond, uncond = fast_twin(model), make_inputs(seed=1), make_inputs(seed=2)
    expected = in_session(fast, cond), in_session(fast, uncond)
    for _ in range(2):
        with torch.no_grad():
            for number, (one, other) in enumerate(zip(cond, uncond, strict=True)):
                with toca_fx.branch("cond"):
                    assert same([call(fast, *one)], [expected[0][number]])
                with toca_fx.branch("uncond"):
                    assert same([call(fast, *other)], [expected[1][number]])


def test_two_calls_with_one_timestep_are_warned_of(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    fast = fast_twin(model)
    with toca_fx.session() as run, torch.no_grad():
        for step in make_inputs(3):
            call(fast, *step)
            call(fast, *step)
    (warning, _) = run.report().warnings
    assert "two calls in a row" in warning
    assert "toca_fx.branch(name)" in warning
    assert warning in caplog.messages


def test_a_failed_call_does_not_swap_the_branches(model: nn.Module) -> None:
    flaky = Flaky()
    fast = toca_fx.compile(model, make_policy(guidance={"layout": "separate"}), inner=flaky)
    cond, uncond = list(make_inputs(6, seed=0)), list(make_inputs(6, seed=1))
    outputs: list[list[Tensor]] = []
    for fails in (False, True):
        outputs.append([])
        with toca_fx.session(), torch.no_grad():
            for number, (one, other) in enumerate(zip(cond, uncond, strict=True)):
                # A full step: its result does not depend on the lost caches.
                flaky.fails = fails and number == 3
                if flaky.fails:
                    with pytest.raises(RuntimeError, match="out of luck"):
                        call(fast, *one)
                    flaky.fails = False
                outputs[-1] += [call(fast, *one), call(fast, *other)]
    assert same(*outputs)


def test_generations_of_one_call_do_not_mix(model: nn.Module) -> None:
    fast = fast_twin(model)
    latents = make_inputs(4).latents
    for number in range(4):
        step = (latents[number], torch.full((2,), 999), torch.tensor([1, 2]))
        with torch.no_grad():
            assert uncached(model, step, call(fast, *step)), f"generation {number}"


# Numbers of steps


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
        warning
        for warning in run.report().warnings
        if "more often than the session's 5 steps" in warning
    ]
    assert len(beyond) == 1
    assert caplog.messages.count(beyond[0]) == 1


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
    with toca_fx.session(timesteps=torch.arange(999, -1, -1)) as run:
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


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (7, "a generation ended after 7 steps; the policy has 12"),
        (20, "a generation went on after them"),
    ],
)
def test_without_a_session_another_number_of_steps_is_noticed(
    model: nn.Module, steps: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    fast = fast_twin(model)
    for _ in range(2):
        run_all(fast, make_inputs(steps))
    assert [message for message in caplog.messages if words in message]
    caplog.clear()
    current_session().close()
    for _ in range(3):
        run_all(fast, make_inputs(12))
    assert not caplog.messages


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


# Reports


KEYS = {
    "steps",
    "sites",
    "flops",
    "cache_bytes",
    "hoisted_bytes",
    "seconds",
    "selection_seconds",
    "compiled_graphs",
    "launches",
    "warnings",
}


def test_the_report_as_data(model: nn.Module) -> None:
    fast = fast_twin(model)
    with toca_fx.session() as run:
        run_all(fast, make_inputs())
    data = run.report().to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data.keys() == KEYS
    assert [(step["index"], step["kind"], step["branch"]) for step in data["steps"]] == [
        (s, DEFAULT[s], "") for s in range(12)
    ]
    assert all(step["seconds"] > 0 for step in data["steps"])
    sites = {site["path"]: site for site in data["sites"]}
    assert list(sites) == [
        f"transformer_blocks.{layer}.{name}" for layer in range(2) for name in ("attn1", "ff")
    ]
    assert sites["transformer_blocks.1.attn1"] == {
        "path": "transformer_blocks.1.attn1",
        "kind": "self_attention",
        "layer": 1,
        "tokens": 64,
        "computed": [64, 0, 0] * 4,
    }
    assert sites["transformer_blocks.0.ff"]["computed"] == [64, 32, 32] * 4
    assert 0 < data["flops"]["done"] < data["flops"]["uncached"]
    assert 0 < data["selection_seconds"] < data["seconds"]
    assert data["compiled_graphs"] == 2
    assert data["warnings"] == []
    assert "12 steps: 4 full, 8 partial" in str(run.report())


@pytest.mark.parametrize(
    "dtype",
    slow_but(
        [torch.bfloat16], [torch.float32, torch.float64, torch.bfloat16], "one width is enough"
    ),
)
def test_cache_bytes_are_those_allocated(dtype: torch.dtype) -> None:
    batch, tokens, channels, layers = 3, 64, 32, 2
    model = tiny("original", layers=layers).to(dtype)
    fast = fast_twin(model)
    with toca_fx.session() as run:
        run_all(fast, make_inputs(2, batch=batch, dtype=dtype))
        (generation,) = run.generations
        tensors = [*generation.storage.buffers.values(), *generation.storage.selector._stale]
        allocated = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    score = 8 if dtype == torch.float64 else 4
    features = 2 * layers * batch * tokens * channels * dtype.itemsize
    assert (
        run.report().cache_bytes
        == allocated
        == features + layers * batch * tokens * (2 * score + 1)
    )


def test_cache_bytes_of_two_branches(model: nn.Module) -> None:
    fast = fast_twin(model)
    sizes = []
    for branches in (("a",), ("a", "b")):
        with toca_fx.session() as run, torch.no_grad():
            for step in make_inputs(2):
                for name in branches:
                    with toca_fx.branch(name):
                        call(fast, *step)
        sizes.append(run.report().cache_bytes)
    assert sizes[1] == 2 * sizes[0] > 0


def test_a_report_without_calls() -> None:
    with toca_fx.session() as run:
        pass
    data = run.report().to_dict()
    assert data.keys() == KEYS
    assert data["steps"] == data["sites"] == []
    assert "no sites" in str(run.report())


def test_warnings_are_logged_once(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="toca_fx")
    fast = fast_twin(model)
    with toca_fx.session(num_steps=2) as run:
        run_all(fast, make_inputs(6))
    assert caplog.messages == list(run.report().warnings)
