"""Does it wait, and does it cost what it says: launches, host time, memory."""

from __future__ import annotations

import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import toca_fx
from tests.gpu.generations import DEVICE, POLICY, STEPS, generate, make
from toca_fx.examples import prediction

pytestmark = pytest.mark.card


@pytest.mark.parametrize("mode", [None, "default"])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "name", ["DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel"]
)
def test_it_never_waits(name: str, told: bool, mode: str | None) -> None:
    case = make(name, torch.float32)
    fast = toca_fx.compile(case.model, POLICY, mode=mode)
    expected, _ = generate(fast, case, told=told)
    torch.cuda.synchronize()
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs, _ = generate(fast, case, told=told)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(outputs, expected)


def test_a_recorded_step_is_one_launch() -> None:
    case = make("DiTTransformer2DModel", torch.float32)
    fast = toca_fx.compile(case.model, POLICY)
    for _ in range(3):
        generate(fast, case)
    with (
        torch.no_grad(),
        toca_fx.session(timesteps=case.timesteps),
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found,
    ):
        for call in case.calls:
            fast(**call)
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in found.key_averages()}
    assert sum(count for key, count in calls.items() if "GraphLaunch" in key) == STEPS
    # Beside it: copies of the inputs, and of the output.
    kernels = sum(
        count for key, count in calls.items() if "LaunchKernel" in key or "MemcpyAsync" in key
    )
    assert kernels <= 8 * STEPS


def test_host_time_of_a_recorded_step() -> None:
    """Of a small model: nothing but Dynamo's guards, copies of the inputs and one launch."""
    case = make("DiTTransformer2DModel", torch.float32)
    fast = toca_fx.compile(case.model, POLICY)
    for _ in range(3):
        generate(fast, case)
    times = []
    with torch.no_grad(), toca_fx.session(timesteps=case.timesteps):
        for call in case.calls:
            began = time.perf_counter()
            prediction(fast(**call))
            times.append(time.perf_counter() - began)
    assert sorted(times)[len(times) // 2] < 1e-3


def test_memory_comes_back() -> None:
    case = make("DiTTransformer2DModel", torch.float32)
    fast = toca_fx.compile(case.model, POLICY, mode="default")
    generate(fast, case)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    generate(fast, case)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(DEVICE) <= before
