"""Threads, tasks, models and guidance branches: each generation has memories of its own."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import Inputs, call, make_inputs, make_policy, run_all, tiny
from tests.models import OriginalDiT
from tests.system.runtime.generations import DEFAULT, Flaky, fast_twin, in_session, same, uncached


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


def test_without_a_session_threads_are_told_apart(model: nn.Module) -> None:
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
    if not explicit:
        run_all(fast, cond)  # the schedule is known from here on
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
    assert f"toca_fx: {warning}" in caplog.messages


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


class Weaker(nn.Module):
    """A model that can leave out a block, for skip-layer guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = OriginalDiT(depth=2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, skip: bool = False) -> Tensor:
        dit = self.dit
        tokens, c = dit.x_embedder(x) + dit.pos_embed, dit.t_embedder(t) + dit.y_embedder(y)
        for block in dit.blocks[1:] if skip else dit.blocks:
            tokens = block(tokens, c)
        found: Tensor = dit.unpatchify(dit.final_layer(tokens, c))
        return found


def test_a_call_by_other_code_is_nobody_elses() -> None:
    """It has the sizes and the prompt of another branch, and nobody names them."""
    fast = fast_twin(Weaker().eval().requires_grad_(False))
    negative, prompt = torch.tensor([1, 1]), torch.tensor([2, 2])
    with toca_fx.session() as run, torch.no_grad():
        for x, t, _ in make_inputs():
            fast(x, t, negative)
            fast(x, t, prompt)
            fast(x, t, prompt, skip=True)
    kinds = [step.kind for step in run.report().steps]
    assert kinds.count("partial") >= 3 * 7
    assert kinds[:3] == ["full"] * 3


class Embedded(nn.Module):
    """A model whose prompt is an embedding of any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = OriginalDiT(depth=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        dit = self.dit
        tokens, c = dit.x_embedder(x) + dit.pos_embed, dit.t_embedder(t) + y.float()
        for block in dit.blocks:
            tokens = block(tokens, c)
        found: Tensor = dit.unpatchify(dit.final_layer(tokens, c))
        return found


def test_prompts_may_have_dtypes_of_their_own() -> None:
    fast = fast_twin(Embedded().eval().requires_grad_(False))
    prompts = torch.randn(2, 32), torch.randn(2, 32).bfloat16()
    with toca_fx.session() as run, torch.no_grad():
        for x, t, _ in make_inputs():
            for prompt in prompts:
                fast(x, t, prompt)
    assert [step.kind for step in run.report().steps] == [
        kind for kind in DEFAULT for _ in range(2)
    ]
