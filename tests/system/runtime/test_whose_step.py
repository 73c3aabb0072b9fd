"""Whose step it is: requests that take turns, handles, generators, tasks and threads, branches."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import Call, call, make_inputs, run_all
from tests.marks import slow_but
from tests.system.runtime.generations import fast_twin, in_session, same, uncached
from toca_fx.runtime.context import current_place

STEPS = 6
KINDS = ["full", "partial", "partial"] * 2


def requests(count: int, *, one_prompt: bool = False) -> list[list[Call]]:
    """The calls of some images, each with a prompt of its own, or all with one."""
    found = [list(make_inputs(STEPS, seed=seed)) for seed in range(count)]
    return [[(x, t, found[0][0][2]) for x, t, _ in each] for each in found] if one_prompt else found


def twin_of(model: nn.Module) -> nn.Module:
    return fast_twin(model, sampler={"steps": STEPS})


@pytest.fixture
def alone(model: nn.Module) -> Any:
    """The images of requests, each by itself."""
    fast = twin_of(model)

    def images(many: list[list[Call]]) -> list[list[Tensor]]:
        found = []
        for each in many:
            with toca_fx.session(STEPS):
                found.append(run_all(fast, each))
        return found

    images.fast = fast  # type: ignore[attr-defined]
    return images


def taught(fast: nn.Module) -> None:
    """Let the model run the schedule of all requests once, so that it is known."""
    run_all(fast, make_inputs(STEPS, seed=99))


def in_turns(many: list[Iterator[Tensor]]) -> list[list[Tensor]]:
    """A step of each in turn, the later ones beginning later."""
    found: list[list[Tensor]] = [[] for _ in many]
    for moment in range(STEPS + len(many) - 1):
        for at, steps in enumerate(many):
            if at <= moment < at + STEPS:
                found[at].append(next(steps))
    return found


@torch.no_grad()
def steps_of(fast: nn.Module, calls: list[Call], session: Any = None) -> Iterator[Tensor]:
    for step in calls:
        with session or nullcontext():
            yield call(fast, *step).clone()


def test_requests_that_take_turns_are_told_apart_by_their_prompts(alone: Any) -> None:
    many = requests(3)
    expected = alone(many)
    taught(alone.fast)
    found = in_turns([steps_of(alone.fast, each) for each in many])
    assert all(map(same, found, expected))


def test_requests_of_one_prompt_never_read_each_others_memories(
    model: nn.Module, alone: Any
) -> None:
    many = requests(2, one_prompt=True)
    expected = alone(many)
    taught(alone.fast)
    found = in_turns([steps_of(alone.fast, each) for each in many])
    for at, calls in enumerate(many):
        for number, step in enumerate(calls):
            output = found[at][number]
            own = same([output], [expected[at][number]])
            assert own or uncached(model, step, output), (at, number)


def test_same_prompts_and_a_fitting_timestep_cannot_be_told_apart(alone: Any) -> None:
    """Documented: who stops an image and begins another of the same prompt tensors in the middle of
    the same schedule, where the first one stopped, needs a session.
    """
    first, second = requests(2, one_prompt=True)
    run_all(alone.fast, first)
    run_all(alone.fast, first[:1])
    mixed = run_all(alone.fast, second[1:])
    with toca_fx.session(STEPS - 1):
        right = run_all(alone.fast, second[1:])
    assert not same(mixed[:1], right[:1])


@pytest.mark.parametrize("one_prompt", [False, True])
def test_a_handle_is_entered_again_and_again(alone: Any, one_prompt: bool) -> None:
    many = requests(3, one_prompt=one_prompt)
    expected = alone(many)
    runs = [toca_fx.session(STEPS) for _ in many]

    def steps(calls: list[Call], run: Any) -> Iterator[Tensor]:
        for step in calls:
            with run, torch.no_grad():
                yield_ = call(alone.fast, *step).clone()
            yield yield_

    found = in_turns([steps(each, run) for each, run in zip(many, runs, strict=True)])
    assert all(map(same, found, expected))
    for run in runs:
        assert [step.kind for step in run.report().steps] == KINDS
        assert run.report().warnings == ()


@pytest.mark.parametrize("one_prompt", [False, True])
def test_generators_with_a_session_of_their_own(alone: Any, one_prompt: bool) -> None:
    many = requests(3, one_prompt=one_prompt)
    expected, reports = alone(many), []

    @torch.no_grad()
    def image(calls: list[Call]) -> Iterator[Tensor]:
        with toca_fx.session(STEPS) as run:
            reports.append(run)
            for step in calls:
                yield call(alone.fast, *step).clone()

    found = in_turns([image(each) for each in many])
    assert all(map(same, found, expected))
    for run in reports:
        assert [step.kind for step in run.report().steps] == KINDS
    assert run_all(alone.fast, many[0])[0].isfinite().all(), "no closed session stays behind"


def test_a_generator_goes_on_in_another_thread(alone: Any) -> None:
    (calls,) = requests(1)
    (expected,) = alone([calls])

    def image() -> Iterator[Tensor]:
        with toca_fx.session(STEPS) as run:
            for step in calls:
                with torch.no_grad():
                    output = call(alone.fast, *step).clone()
                yield output
        assert [step.kind for step in run.report().steps] == KINDS

    steps, found = image(), []
    for _ in calls:
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(next, steps).result())
    assert next(steps, None) is None
    assert same(found, expected)


def test_a_session_in_a_context_manager_of_ones_own(alone: Any) -> None:
    (calls,) = requests(1)
    (expected,) = alone([calls])

    @contextmanager
    def sampling() -> Iterator[Any]:
        with toca_fx.session(STEPS) as run:
            assert same(run_all(alone.fast, calls[:1]), expected[:1])
            yield run

    with sampling() as run:
        assert same(run_all(alone.fast, calls[1:]), expected[1:])
    assert [step.kind for step in run.report().steps] == KINDS


@pytest.mark.parametrize("how", ["awaited", "to_thread", "a task per step"])
@pytest.mark.parametrize("gathered", [False, True])
def test_tasks(alone: Any, how: str, gathered: bool) -> None:
    many = requests(3)
    expected = alone(many)
    taught(alone.fast)

    def step_of(step: Call) -> Tensor:
        with torch.no_grad():
            return call(alone.fast, *step).clone()

    async def image(calls: list[Call]) -> list[Tensor]:
        found = []
        for step in calls:
            if how == "to_thread":
                found.append(await asyncio.to_thread(step_of, step))
            elif how == "awaited":
                found.append(step_of(step))
                await asyncio.sleep(0)
            else:

                async def one(step: Call = step) -> Tensor:
                    return step_of(step)

                found.append(await asyncio.create_task(one()))
        return found

    async def together() -> list[list[Tensor]]:
        with toca_fx.session(STEPS) if gathered else nullcontext() as run:
            found = await asyncio.gather(*map(image, many))
        if gathered:
            kinds = [step.kind for step in run.report().steps]
            assert kinds.count("partial") == 3 * KINDS.count("partial")
        return found

    assert all(map(same, asyncio.run(together()), expected))


def test_an_async_generator_is_closed_by_another_task(alone: Any) -> None:
    (calls,) = requests(1)
    (expected,) = alone([calls])

    async def image() -> AsyncIterator[Tensor]:
        with toca_fx.session(STEPS):
            for step in calls:
                with torch.no_grad():
                    output = call(alone.fast, *step).clone()
                yield output

    async def together() -> list[Tensor]:
        steps: Any = image()
        found = [await anext(steps) for _ in range(2)]
        await asyncio.create_task(steps.aclose())
        return found

    assert same(asyncio.run(together()), expected[:2])
    assert same(in_session(alone.fast, calls, STEPS), expected)  # type: ignore[arg-type]


def test_a_thread_per_step(alone: Any) -> None:
    many = requests(2)
    expected = alone(many)
    taught(alone.fast)
    found: list[list[Tensor]] = [[], []]
    for number in range(STEPS):
        for at, calls in enumerate(many):
            thread = threading.Thread(
                target=lambda at=at, step=calls[number]: found[at].extend(
                    run_all(alone.fast, [step])
                )
            )
            thread.start()
            thread.join()
    assert all(map(same, found, expected))


def test_a_session_that_saw_no_call_says_so(model: nn.Module) -> None:
    fast, calls = twin_of(model), requests(1)[0]
    with toca_fx.session(STEPS) as run:
        thread = threading.Thread(target=run_all, args=(fast, calls))
        thread.start()
        thread.join()
    (warning,) = run.report().warnings
    assert "saw no call" in warning
    assert "with run:" in warning

    def in_the_run() -> None:
        with run_in_thread:
            run_all(fast, calls)

    with toca_fx.session(STEPS) as run_in_thread:
        thread = threading.Thread(target=in_the_run)
        thread.start()
        thread.join()
    assert [step.kind for step in run_in_thread.report().steps] == KINDS
    assert run_in_thread.report().warnings == ()


def test_a_run_ends_with_its_handle_or_when_it_is_closed(model: nn.Module) -> None:
    fast, calls = twin_of(model), requests(1)[0]
    handle = toca_fx.session(STEPS)
    for step in calls[:2]:
        with handle as run:
            run_all(fast, [step])
    assert run.session.generations, "planned steps are left"
    del handle
    gc.collect()
    assert run.session.closed
    assert any("had 2" in warning for warning in run.report().warnings)
    with pytest.raises(RuntimeError, match="the session is closed"), run:
        run_all(fast, calls[2:3])
    with toca_fx.session(STEPS) as run:
        run_all(fast, calls[:2])
        run.close()
        with pytest.raises(RuntimeError, match="the session is closed"):
            run_all(fast, calls[2:3])
    assert run_all(fast, calls)[0].isfinite().all()


def test_branches_nest(model: nn.Module) -> None:
    """Tiles, each with a prompt and an empty prompt of its own."""
    fast = twin_of(model)
    many = requests(4)
    expected = [in_session(fast, each, STEPS) for each in many]  # type: ignore[arg-type]
    found: list[list[Tensor]] = [[] for _ in many]
    with toca_fx.session(STEPS) as run, torch.no_grad():
        for number in range(STEPS):
            for tile in range(2):
                with toca_fx.branch(f"tile {tile}"):
                    for at in (2 * tile, 2 * tile + 1):
                        with toca_fx.branch("uncond") if at % 2 else nullcontext():
                            found[at].append(call(fast, *many[at][number]).clone())
    assert all(map(same, found, expected))
    assert {step.branch for step in run.report().steps} == {
        "tile 0",
        "tile 0/uncond",
        "tile 1",
        "tile 1/uncond",
    }


def test_a_branch_in_a_generator_is_for_its_own_calls(alone: Any) -> None:
    many = requests(2, one_prompt=True)
    expected = alone(many)

    @torch.no_grad()
    def image(name: str, calls: list[Call]) -> Iterator[Tensor]:
        with toca_fx.branch(name):
            for step in calls:
                yield call(alone.fast, *step).clone()

    with toca_fx.session(STEPS) as run:
        found = in_turns([image(name, calls) for name, calls in zip("ab", many, strict=True)])
    assert all(map(same, found, expected))
    assert {step.branch for step in run.report().steps} == {"a", "b"}
    assert current_place().path == ()


def test_a_branch_goes_with_its_generator_to_another_thread(alone: Any) -> None:
    many = requests(2, one_prompt=True)
    expected = alone(many)
    run = toca_fx.session(STEPS)

    def image(name: str, calls: list[Call]) -> Iterator[Tensor]:
        with toca_fx.branch(name):
            for step in calls:
                with run, torch.no_grad():
                    output = call(alone.fast, *step).clone()
                yield output

    steps = [image(name, calls) for name, calls in zip("ab", many, strict=True)]
    found: list[list[Tensor]] = [[], []]
    for _ in range(STEPS):
        for at, each in enumerate(steps):
            with ThreadPoolExecutor(1) as pool:
                found[at].append(pool.submit(next, each).result())
    assert all(map(same, found, expected))
    assert [step.branch for step in run.report().steps] == ["a", "b"] * STEPS


def test_branches_that_never_come_again_go(model: nn.Module) -> None:
    fast = twin_of(model)
    with toca_fx.session(30) as run:
        for number, step in enumerate(make_inputs(30)):
            run_all(fast, [step])
            with toca_fx.branch(f"window {number}"):
                run_all(fast, [step])
            held = [each for each in run.session.generations if each.storage is not None]
            assert len(held) <= 1 + 9


def test_many_branches_are_cached(model: nn.Module) -> None:
    fast = twin_of(model)
    with toca_fx.session(STEPS) as run:
        for step in make_inputs(STEPS):
            for tile in range(20):
                with toca_fx.branch(f"tile {tile}"):
                    run_all(fast, [step])
    assert [step.kind for step in run.report().steps].count("partial") == 20 * 4


def test_a_run_is_entered_by_two_threads_at_once(alone: Any) -> None:
    many = requests(2)
    expected, found = alone(many), [[], []]
    run, meet = toca_fx.session(STEPS), threading.Barrier(2, timeout=60)

    def branch(at: int) -> None:
        for number in range(STEPS):
            with run:
                meet.wait()
                if at:  # the other has left meanwhile
                    meet.wait()
                found[at].extend(run_all(alone.fast, [many[at][number]]))
            if not at:
                meet.wait()

    threads = [threading.Thread(target=branch, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(same, found, expected))
    assert len(run.report().steps) == 2 * STEPS


GUIDED = (range(1, 6), range(2, 6), range(3), (0, 1, 4, 5), (2,))
GUIDANCE = tuple(itertools.product((True, False), GUIDED, ("cond", "uncond")))
GUIDANCE_OFTEN = (*((True, guided, "cond") for guided in GUIDED), (False, (0, 1, 4, 5), "uncond"))


@pytest.mark.parametrize(
    ("told", "guided", "first"),
    slow_but(GUIDANCE_OFTEN, GUIDANCE, "each span once, each order and each way to tell once"),
)
def test_guidance_that_begins_later_ends_earlier_or_pauses(
    model: nn.Module, told: bool, guided: Any, first: str
) -> None:
    """The prompt's image is as without guidance; of the empty prompt only full steps and partial
    ones on its own memories come.
    """
    fast = twin_of(model)
    cond, uncond = requests(2)
    expected = in_session(fast, cond, STEPS)  # type: ignore[arg-type]
    listed = [float(t[0]) for _, t, _ in cond]
    with toca_fx.session(timesteps=listed) if told else toca_fx.session(STEPS), torch.no_grad():
        for number in range(STEPS):
            order = [("cond", cond[number]), ("uncond", uncond[number])]
            for name, step in order if first == "cond" else order[::-1]:
                if name == "cond":
                    assert same([call(fast, *step)], [expected[number]]), number
                elif number in guided:
                    output = call(fast, *step)
                    begins = number == 0 or number - 1 not in guided
                    assert uncached(model, step, output) == (begins or number % 3 == 0), number


def test_guided_latents_may_lie_otherwise_from_step_to_step(model: nn.Module) -> None:
    images = requests(2)
    fast = twin_of(model)
    with toca_fx.session(STEPS) as run:
        for number, pair in enumerate(zip(*images, strict=True)):
            for x, t, y in pair:
                lies = torch.channels_last if number % 2 else torch.contiguous_format
                call(fast, x.contiguous(memory_format=lies), t, y)
    assert [step.kind for step in run.report().steps] == [kind for kind in KINDS for _ in pair]


def test_a_second_order_sampler_is_no_guidance_and_no_new_image(model: nn.Module) -> None:
    calls = list(make_inputs(11, seed=3))
    order = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    heun = [(x, calls[at][1], y) for (x, _, y), at in zip(calls, order, strict=True)]
    fast = twin_of(model)
    listed = [float(t[0]) for _, t, _ in heun]
    with toca_fx.session(timesteps=listed) as run:
        run_all(fast, heun)
    assert [step.kind for step in run.report().steps] == (["full", "partial", "partial"] * 4)[:11]
    assert not any("same timestep" in warning for warning in run.report().warnings)
    restarts = [0, 1, 2, 3, 1, 2, 3, 4, 5]  # back to a higher timestep
    again = [(calls[at][0], calls[k][1], calls[0][2]) for at, k in enumerate(restarts)]
    with toca_fx.session(timesteps=[float(t[0]) for _, t, _ in again]) as run:
        run_all(fast, again)
    assert [step.kind for step in run.report().steps] == ["full", "partial", "partial"] * 3


def test_timesteps_per_row_are_taken_call_by_call(model: nn.Module) -> None:
    """As in diffusion forcing: 6 calls of 2 rows are 6 steps, not 12."""
    fast = twin_of(model)
    calls = [
        (x, torch.tensor([900 - 100 * k, 950 - 100 * k]), y)
        for k, (x, _, y) in enumerate(make_inputs(STEPS))
    ]
    told = [t.tolist() for _, t, _ in calls]
    with toca_fx.session(timesteps=told) as run:
        run_all(fast, calls)
    assert [step.kind for step in run.report().steps] == KINDS
    with toca_fx.session(STEPS) as run:
        run_all(fast, calls)
    assert [step.kind for step in run.report().steps] == KINDS
    x, _, y = calls[2]
    with toca_fx.session(STEPS) as run:
        run_all(fast, [*calls[:2], (x, torch.tensor([700, 999]), y), *calls[3:]])
    assert [step.kind for step in run.report().steps][2] == "full"
    assert any("rows seem to have been taken over" in each for each in run.report().warnings)


def test_rows_are_never_taken_for_each_other(model: nn.Module) -> None:
    """What is computed of [900, 900, 500] is not that of [900, 500, 500]."""
    fast = fast_twin(model, N={"base": 1}, sampler={"steps": STEPS})
    latents = make_inputs(STEPS, batch=3)
    rows = [
        [900, 900, 500],
        [900, 500, 500],
        [800, 500, 400],
        [800, 400, 400],
        [9, 9, 4],
        [9, 4, 4],
    ]
    for _ in range(2):
        with toca_fx.session(STEPS), torch.no_grad():
            for (x, _, y), row in zip(latents, rows, strict=True):
                step = (x, torch.tensor(row), y)
                assert uncached(model, step, call(fast, *step)), row


def test_two_images_in_one_session(model: nn.Module) -> None:
    fast = twin_of(model)
    for one_prompt in (False, True):
        first, second = requests(2, one_prompt=one_prompt)
        expected = in_session(fast, second, STEPS)  # type: ignore[arg-type]
        with toca_fx.session(2 * STEPS):
            run_all(fast, first)
            assert same(run_all(fast, second), expected)


def test_cache_context_tells_branches_and_steps(model: nn.Module) -> None:
    fast = twin_of(model)
    cond, uncond = requests(2, one_prompt=True)
    expected = [in_session(fast, each, STEPS) for each in (cond, uncond)]  # type: ignore[arg-type]
    for _ in range(2):
        found: list[list[Tensor]] = [[], []]
        for number in range(STEPS):
            told = {"step_index": number, "num_inference_steps": STEPS, "sigma": 0.5}
            for at, (name, step) in enumerate((("cond", cond[number]), ("uncond", uncond[number]))):
                with fast.cache_context(name, **told), torch.no_grad():
                    found[at].append(call(fast, *step).clone())
        assert all(map(same, found, expected))
