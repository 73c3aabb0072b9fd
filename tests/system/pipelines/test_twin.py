"""A compiled pipeline is a view of its pipeline, and each call of it is told by the scheduler."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler

import toca_fx
from toca_fx.runtime.report import Report
from tools.pipelines.cases import CASES
from tools.pipelines.check import tensors
from tools.pipelines.families.flux import flux as make_flux
from tools.pipelines.families.wan import experts
from tools.pipelines.measure import EVERY, THIRD, expected, held_bytes, plans

SHALLOW = {"num_layers": 1}
FLUX = replace(
    CASES["FluxPipeline"],
    build=lambda: make_flux("FluxPipeline", {**SHALLOW, "num_single_layers": 1}),
)
WAN = replace(CASES["WanPipeline, two experts"], build=lambda: experts(**SHALLOW))


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow(reason="alike"))


def compiled(pipe: Any, policy: Any = THIRD) -> Any:
    return toca_fx.compile(pipe, policy, inner="eager")


@pytest.fixture
def held() -> Callable[[], int]:
    """The bytes that are held, beside those that other tests have left."""
    before = held_bytes()
    return lambda: max(held_bytes() - before, 0)


@pytest.fixture
def flux() -> Any:
    return FLUX.build()


@pytest.fixture
def fast(flux: Any) -> Any:
    return compiled(flux)


def image(pipe: Any, steps: int = 12, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    output = pipe(**FLUX.inputs(pipe), num_inference_steps=steps, generator=generator, **more)
    return tensors(output)[0]


def only_plan(report: Report) -> str:
    (plan,) = plans(report).values()
    return plan


def test_it_is_a_view(flux: Any, fast: Any) -> None:
    assert isinstance(fast, type(flux))
    assert type(fast).__name__ == "FluxPipeline"
    assert vars(fast) is vars(flux)
    assert flux.transformer is not fast.transformer
    assert fast.transformer is fast.transformer
    assert fast.components.keys() == flux.components.keys()
    assert fast.components["vae"] is flux.vae
    fast.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert flux.scheduler is fast.scheduler
    other = FLUX.build().transformer
    fast.transformer = other
    assert flux.transformer is other
    fast.transformer = fast.transformer
    assert flux.transformer is other
    assert image(fast).isfinite().all()
    assert only_plan(toca_fx.last_report(fast)) == expected(12)


def test_both_may_be_used_in_turn(held: Callable[[], int], flux: Any, fast: Any) -> None:
    plain, cached = image(flux), image(fast)
    assert not torch.equal(plain, cached)
    assert torch.equal(image(flux), plain)
    assert torch.equal(image(fast), cached)
    assert held() == 0


def test_a_model_that_is_captured_twice_in_a_run_leaves_nothing(held: Callable[[], int]) -> None:
    """Z-Image makes its tables of positions in the first call."""
    case = CASES["ZImageModularPipeline, CFG"]
    case.call(compiled(case.build()))
    assert held() == 0


def test_save_and_load(tmp_path: Any) -> None:
    case = CASES["DiTPipeline"]
    pipe = case.build()
    fast = compiled(pipe)
    fast.save_pretrained(tmp_path)
    loaded = type(fast).from_pretrained(tmp_path)
    assert type(loaded) is type(pipe)
    (one,), (two,) = (tensors(case.call(each)) for each in (loaded, pipe))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "made", [slow(copy.copy), copy.deepcopy, slow(lambda p: pickle.loads(pickle.dumps(p)))]
)
def test_copies_are_compiled(fast: Any, made: Any) -> None:
    other = made(fast)
    assert torch.equal(image(other), image(fast))
    assert only_plan(toca_fx.last_report(other)) == expected(12)


def test_a_pipeline_made_from_it_says_that_it_is_not_compiled(
    fast: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "toca_fx"):
        made = type(fast).from_pipe(fast)
    (said,) = [each for each in caplog.messages if "toca_fx" in each]
    assert "toca_fx.compile(pipe)" in said
    assert torch.equal(image(made), image(fast._toca.pipeline))
    with pytest.raises(TypeError, match="expected a pipeline that toca_fx"):
        toca_fx.last_report(made)
    image(compiled(made))


# Steps


def test_the_plan_is_for_the_calls_that_come(fast: Any) -> None:
    for steps in (5, 12, 9):
        image(fast, steps)
        assert only_plan(toca_fx.last_report(fast)) == expected(steps)
    image(fast, 3, sigmas=[1.0, 0.7, 0.4])
    assert only_plan(toca_fx.last_report(fast)) == expected(3)


@pytest.mark.parametrize("strength", [slow(0.3), 0.6, slow(1.0)])
def test_strength(strength: float) -> None:
    case = CASES["FluxImg2ImgPipeline"]
    pipe = compiled(case.build())
    calls = 0

    def count(*_: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        return {}

    inputs = {**case.inputs(pipe), "strength": strength}
    pipe(**inputs, num_inference_steps=12, callback_on_step_end=count)
    assert only_plan(toca_fx.last_report(pipe)) == expected(calls)
    assert toca_fx.last_report(pipe).warnings == ()


def test_steps_say_what_they_were(fast: Any) -> None:
    image(fast)
    report = toca_fx.last_report(fast)
    assert report.warnings == ()
    steps = report.to_dict()["steps"]
    assert [step["index"] for step in steps] == [*range(12)]
    assert {(step["component"], step["branch"], step["run"]) for step in steps} == {
        ("transformer", "cond", 0)
    }
    times = [step["timestep"][0] for step in steps]
    assert times == sorted(times, reverse=True)
    assert times[0] == 1.0  # as FLUX has them
    assert report.flops_ratio > 1.2
    assert report.hoisted_bytes > 0


def test_two_runs_in_one_call(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second pass over the timesteps, set anew: a run of its own, on new memories."""
    once = image(fast)
    own = type(fast).__mro__[2].__call__

    def twice(self: Any, **kwargs: Any) -> Any:
        own(self, **{**kwargs, "generator": torch.Generator().manual_seed(5)})
        return own(self, **kwargs)

    monkeypatch.setattr(type(fast).__mro__[2], "__call__", twice)
    assert torch.equal(image(fast), once)
    assert [*plans(toca_fx.last_report(fast)).values()] == [expected(12)] * 2
    assert {step.run for step in toca_fx.last_report(fast).steps} == {0, 1}


@pytest.mark.parametrize("stop", ["interrupt", slow("raise")])
def test_a_run_that_is_stopped(held: Callable[[], int], fast: Any, stop: str) -> None:
    whole, kept = image(fast), []

    def halt(pipe: Any, step: int, _time: Any, _given: Any) -> dict[str, Any]:
        if step == 6:
            kept.append(held())
            if stop == "raise":
                raise KeyboardInterrupt
            pipe._interrupt = True
        return {}

    if stop == "raise":
        with pytest.raises(KeyboardInterrupt):
            image(fast, callback_on_step_end=halt)
    else:
        image(fast, callback_on_step_end=halt)
    assert kept[0] > 0
    assert held() == 0
    assert len(toca_fx.last_report(fast).steps) == 7
    assert torch.equal(image(fast), whole)


def test_a_session_of_the_users_own_counts(fast: Any) -> None:
    with toca_fx.session(12) as run:
        image(fast)
    assert len(run.report().steps) == 12
    assert toca_fx.last_report(fast).steps == run.report().steps


def test_reports_are_of_their_thread(fast: Any) -> None:
    with pytest.raises(RuntimeError, match=r"last_report\(FluxPipeline\): .* not been called"):
        toca_fx.last_report(fast)
    thread = threading.Thread(target=image, args=(fast,))
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="in this thread"):
        toca_fx.last_report(fast)
    image(fast)
    assert len(toca_fx.last_report(fast).steps) == 12


# Two experts


def test_each_expert_has_steps_and_memories_of_its_own(held: Callable[[], int]) -> None:
    pipe = compiled(WAN.build())
    WAN.call(pipe)
    found = plans(toca_fx.last_report(pipe))
    assert all(plan == expected(len(plan)) for plan in found.values())
    assert {key.split("/")[1] for key in found} == {"transformer", "transformer_2"}
    assert sum(map(len, found.values())) == 24
    assert held() == 0


def test_a_policy_for_each_expert() -> None:
    pipe = compiled(WAN.build(), {"transformer": EVERY, "transformer_2": THIRD})
    WAN.call(pipe)
    found = plans(toca_fx.last_report(pipe))
    assert {plan for key, plan in found.items() if "/transformer/" in key} == {"FFFF"}
    assert {plan for key, plan in found.items() if "/transformer_2/" in key} == {expected(8)}


def test_policies_for_what_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"`transformer_2`.*it has transformer, transformer_2"):
        compiled(WAN.build(), {"transformer": EVERY, "transformer_3": THIRD})


def test_a_twin_in_it_keeps_its_policy(fast: Any) -> None:
    fast.transformer = compiled(fast._toca.pipeline.transformer, EVERY)
    image(fast)
    assert only_plan(toca_fx.last_report(fast)) == "F" * 12
    image(compiled(fast))
    assert only_plan(toca_fx.last_report(fast)) == "F" * 12


# Refusals


def test_a_u_net_is_refused() -> None:
    class UNetPipeline:
        unet = torch.nn.Linear(1, 1)

    with pytest.raises(TypeError, match="got UNetPipeline; it denoises with a U-Net"):
        compiled(UNetPipeline())


def test_a_second_cache_is_refused(flux: Any, fast: Any) -> None:
    config = FirstBlockCacheConfig(threshold=0.1)
    with pytest.raises(ValueError, match="diffusers' enable_cache"):
        fast.transformer.enable_cache(config)
    flux.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="call disable_cache"):
        image(fast)
    with pytest.raises(ValueError, match="call disable_cache"):
        compiled(flux)
    flux.transformer.disable_cache()
    image(fast)
    assert only_plan(toca_fx.last_report(fast)) == expected(12)
