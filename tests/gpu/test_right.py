"""Is it right: N = 1 is the model, inductor is eager, recorded is queued, whatever streams and
threads.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import toca_fx
from tests.gpu.generations import (
    DEVICE,
    DRY,
    MODELS,
    POLICY,
    STEPS,
    apart,
    generate,
    make,
    uncached,
)

EXACT, ROUNDED = 2e-5, 5e-2
KINDS = ["full", "full", "partial", "partial", "full", "partial", "partial", "full"]


@pytest.mark.parametrize("name", MODELS)
def test_an_interval_of_one_is_the_model(name: str) -> None:
    case = make(name, torch.float32)
    fast = toca_fx.compile(case.model, {**POLICY, "N": {"base": 1}})
    outputs, _ = generate(fast, case)
    assert apart(outputs, uncached(case)) < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_inductor_is_eager(name: str) -> None:
    case = make(name, torch.float32)
    expected, report = generate(toca_fx.compile(case.model, POLICY, inner="eager"), case)
    assert [step.kind for step in report.steps] == KINDS
    assert apart(expected, uncached(case)) > 1e-3, "something was cached"
    torch._dynamo.reset()
    fast = toca_fx.compile(case.model, POLICY)
    first, _ = generate(fast, case)
    assert apart(first, expected) < EXACT
    for _ in range(3):  # queued, recorded, replayed
        again, report = generate(fast, case)
        assert torch.equal(again, first)
    if not DRY:
        assert {step.launch.how for step in report.steps} == {"recorded"}, report.launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = make(name, dtype)
    fast = toca_fx.compile(case.model, POLICY)
    first, report = generate(fast, case)
    assert [step.kind for step in report.steps] == KINDS
    assert apart(generate(fast, case)[0], first) == 0
    torch._dynamo.reset()
    plain = {**POLICY, "N": {"base": 1}}
    assert apart(generate(toca_fx.compile(case.model, plain), case)[0], uncached(case)) < ROUNDED


@pytest.mark.parametrize("mode", ["reduce-overhead", "default", "max-autotune-no-cudagraphs"])
def test_every_mode_gives_the_same(mode: str) -> None:
    case = make("DiTTransformer2DModel", torch.float32)
    expected, _ = generate(toca_fx.compile(case.model, POLICY), case)
    torch._dynamo.reset()
    fast = toca_fx.compile(case.model, POLICY, mode=mode)
    for _ in range(3):
        outputs, report = generate(fast, case)
        assert apart(outputs, expected) < EXACT
    if not DRY:
        assert {step.launch.how for step in report.steps} == {
            "recorded" if mode == "reduce-overhead" else "queued"
        }


def test_recordings_follow_the_inputs() -> None:
    """Other latents, other labels, timesteps told or not."""
    cases = [make("DiTTransformer2DModel", torch.float32, seed) for seed in range(3)]
    model = cases[0].model
    labels = [(case.calls[0]["class_labels"] + seed) % 10 for seed, case in enumerate(cases)]
    for case, label in zip(cases, labels, strict=True):
        for call in case.calls:
            call["class_labels"] = label
    fast = toca_fx.compile(model, POLICY, mode="default")
    expected = [generate(fast, case)[0] for case in cases]
    torch._dynamo.reset()
    fast = toca_fx.compile(model, POLICY)
    for told in (True, False, True):
        for case, right in zip(cases, expected, strict=True):
            outputs, _ = generate(fast, case, told=told)
            assert apart(outputs, right) < EXACT


@pytest.mark.card
def test_parameters_that_move() -> None:
    case = make("DiTTransformer2DModel", torch.float32)
    fast = toca_fx.compile(case.model, POLICY)
    expected = [generate(fast, case)[0] for _ in range(3)][-1]
    for parameter in case.model.parameters():
        old, parameter.data = parameter.data, parameter.data.clone()
        old.fill_(torch.nan)
    outputs, _ = generate(fast, case)
    assert apart(outputs, expected) < EXACT


@pytest.mark.card
@pytest.mark.parametrize("mode", [None, "default"])
def test_two_streams(mode: str | None) -> None:
    """Generations in turn on streams of their own: recordings and storages are shared, and must not
    overlap.
    """
    cases = [make("DiTTransformer2DModel", torch.float32, seed) for seed in range(2)]
    fast = toca_fx.compile(cases[0].model, POLICY, mode=mode)
    for _ in range(3):
        expected = [generate(fast, case)[0] for case in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(generate(fast, case)[0])
        torch.cuda.synchronize()
        assert all(
            apart(outputs, right) < EXACT for outputs, right in zip(found, expected, strict=True)
        )


@pytest.mark.parametrize("mode", [None, "default"])
def test_two_threads(mode: str | None) -> None:
    cases = [make("DiTTransformer2DModel", torch.float32, seed) for seed in range(2)]
    fast = toca_fx.compile(cases[0].model, POLICY, mode=mode)
    expected = [generate(fast, case)[0] for case in cases]
    ready = threading.Barrier(2)

    def work(at: int) -> list[float]:
        found = []
        for _ in range(5):
            ready.wait(60)
            stream = torch.cuda.Stream() if not DRY else None
            with torch.cuda.stream(stream):
                outputs, _ = generate(fast, cases[at])
            if stream is not None:
                stream.synchronize()
            found.append(apart(outputs, expected[at]))
        return found

    with ThreadPoolExecutor(2) as pool:
        differences = list(pool.map(work, range(2)))
    assert max(map(max, differences)) < EXACT


def test_the_model_goes_where_it_is_told() -> None:
    case = make("DiTTransformer2DModel", torch.float32)
    outputs, report = generate(toca_fx.compile(case.model, POLICY), case)
    assert outputs.device.type == DEVICE
    assert len(report.steps) == STEPS
