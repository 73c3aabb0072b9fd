"""The predicted peak against what inductor's code allocates, run on fake tensors for a GPU that is
not there, and against an H100.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toca_fx
from tests.made_up_cuda import fake_example, made_up_cuda
from toca_fx import load_policy
from toca_fx.capture.dynamo import capture
from toca_fx.examples import PRESETS, build
from toca_fx.lower import memory
from toca_fx.lower.compiler import Inner
from toca_fx.lower.cost import Analysis
from toca_fx.lower.memory import allocated, predict, step_peak
from toca_fx.lower.program import CompiledStep
from toca_fx.plan import buffers
from toca_fx.plan.buffers import Buffers
from toca_fx.plan.plan import Plan, StepPlan

MIB = 2**20

# Real widths and few blocks; two equal ones make pieces of a graph.
CASES: dict[str, tuple[dict[str, int], str]] = {
    "dit-xl-2-256": ({"num_layers": 3}, "dit-xl-2"),
    "pixart-alpha-256": ({"num_layers": 3}, "pixart-alpha"),
    "latte-256": ({"num_layers": 2}, "default-video"),
    "flux-dev-1024": ({"num_layers": 2, "num_single_layers": 2}, "flux-dev"),
}


class Allocator(TorchDispatchMode):
    """Counts the bytes of tensors on the GPU that are there, and the most that were there at
    once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == "cuda":
                self.now += self._new(value)
                self.peak = max(self.peak, self.now)
        return result

    def ignore(self, values: Any) -> None:
        """What is there already."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self._known[value.untyped_storage()._cdata] = weakref.ref(value)

    def _new(self, value: Tensor) -> int:
        storage = value.untyped_storage()
        key, nbytes = storage._cdata, allocated(storage.nbytes())
        if key in self._known:
            return 0

        def gone(_reference: Any) -> None:
            del self._known[key]
            self.now -= nbytes

        self._known[key] = weakref.ref(storage, gone)
        return nbytes


@contextlib.contextmanager
def code_on_fakes() -> Iterator[None]:
    """The code that inductor writes around its kernels can be run; what it allocates is fake."""

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda:0")

    def reinterpret(value: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        return torch.as_strided(value, size, stride, value.storage_offset() + offset)

    with (
        mock.patch("torch._C._dynamo.guards._empty_strided_cuda", empty),
        mock.patch("torch._C._dynamo.guards._reinterpret_tensor", reinterpret),
        mock.patch(
            "torch._inductor.utils.copy_misaligned_inputs", return_value=([], [])
        ),  # it asks for addresses
        mock.patch("torch.cuda._exchange_device", return_value=0),
        mock.patch("torch.cuda._maybe_exchange_device", return_value=0),
        mock.patch("torch.cuda.set_device", return_value=None),
        made_up_cuda(),
    ):
        yield


def analysis(preset: str) -> tuple[Analysis, list[Any], FakeTensorMode]:
    """A preset with few blocks on the GPU, its inputs, and the mode that they are fake tensors
    of.
    """
    config, policy = CASES[preset]
    example = PRESETS[preset]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module, call = fake_example(
            dataclasses.replace(example, config={**example.config, **config}), torch.bfloat16
        )
        captured, inputs = capture(module, (), call)
    return Analysis(captured, inputs, load_policy(policy)), inputs, mode


def simulated(
    found: Analysis, plan: Plan, step: StepPlan, inputs: list[Any], mode: FakeTensorMode
) -> int:
    """Bytes that a compiled step allocates at its peak, called as a generation calls it."""
    compiled = CompiledStep(found.step_graph(plan, step.modes), found.aten, plan, Inner())
    made, given = Buffers(found.aten, plan), buffers.given(plan, step.modes)
    allocator = Allocator()
    with mode:
        tensors = {
            name: made.example(name, step.fresh[buffers.site_of(name)])
            if name in given
            else made.new(name)
            for name in compiled.graph.names
        }
        allocator.ignore((inputs, tensors))
        with allocator:
            compiled(inputs, tensors)
    assert allocator.now == 0
    return allocator.peak


@torch.no_grad()
@pytest.mark.parametrize("preset", CASES)
def test_what_compiled_steps_allocate(preset: str) -> None:
    with code_on_fakes():
        found, inputs, mode = analysis(preset)
        plan = found.plan(None)
        found.flops(plan)
        peak = predict(found, plan)
        steps = {step.modes: memory._worst(plan, step.modes) for step in plan.steps}
        assert {step.kind for step in steps.values()} == {"full", "partial"}
        worst = 0
        for modes, step in steps.items():
            counted = found.counted(plan)[modes]
            fresh = {i: (step.fresh[i], site.tokens) for i, site in enumerate(plan.sites)}
            told = step_peak(counted.graph.module.graph, counted.values or {}, fresh)
            seen = simulated(found, plan, step, inputs, mode)
            assert told == pytest.approx(seen, rel=0.03), step.kind
            worst = max(worst, seen)
    assert peak.kept + peak.hoisted + peak.step == pytest.approx(
        peak.kept + peak.hoisted + worst, rel=0.03
    )


def test_what_an_h100_allocated() -> None:
    """torch 2.11, bfloat16, a session that was told its timesteps: max_memory_allocated less what
    was allocated before.
    """
    model, inputs = build(PRESETS["flux-dev-1024"], device="meta", dtype=torch.bfloat16)
    told = toca_fx.explain(model, "flux-dev", **inputs)
    assert told.peak_bytes + told.told_bytes == pytest.approx(3584 * MIB, rel=0.01)
    assert told.cache_bytes + told.hoisted_bytes + told.step_bytes < told.peak_bytes
    (line,) = (line for line in str(told).splitlines() if line.startswith("memory"))
    assert f"{told.peak_bytes / MIB:.1f} MiB at the peak" in line
    assert f"{told.told_bytes / MIB:.1f} more if the session is told its timesteps" in line


def test_the_allocator() -> None:
    """CUDACachingAllocator: blocks of 512 bytes; large ones are not split if 1 MiB or less would be
    left.
    """
    assert [allocated(nbytes) for nbytes in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert [allocated(nbytes * MIB) for nbytes in (3, 9, 10, 11, 12, 27, 28)] == [
        nbytes * MIB for nbytes in (3, 9, 10, 12, 12, 28, 28)
    ]
    assert allocated(26 * MIB + 512) == 26 * MIB + 512


# A graph of one piece: which values are there at once


def peak_of(function: Callable[..., Any], *inputs: Tensor) -> int:
    """The peak of a function of tensors, in float32 tensors of [64, 128]; what is much smaller does
    not count.
    """
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    values = {node.name: node.meta["val"] for node in module.graph.nodes if node.op != "output"}
    return step_peak(module.graph, values, {}) // (64 * 128 * 4)


linear = torch.nn.functional.linear
X, W = torch.zeros(64, 128), torch.zeros(128, 128)


def test_an_mlp_holds_its_hidden_state_once() -> None:
    up, down = torch.zeros(512, 128), torch.zeros(128, 512)
    assert (
        peak_of(
            lambda x, up, down: linear(torch.nn.functional.gelu(linear(x, up)), down), X, up, down
        )
        == 4 + 1
    )
    assert peak_of(lambda x, up, down: linear(linear(x, up), down), X, up, down) == 4 + 1


def test_what_a_product_reads_is_written() -> None:
    assert peak_of(lambda x: (x + 1) * 2 + (x + 1).mean(), X) == 1
    assert peak_of(linear, X, W) == 1
    assert peak_of(lambda x, w: linear(x + 1, w), X, W) == 2


def test_what_reads_a_lot_is_not_computed_again() -> None:
    def of_products(*tensors: Tensor) -> Tensor:
        *xs, w = tensors
        products = [linear(x, w) for x in xs]
        added = sum(products[1:], products[0])
        return linear(added * 2, w) + linear(added * 3, w)

    # The sum of four products is computed for each of its two readers, and so all four stay; that
    # of six is written, in place of one.
    assert peak_of(of_products, *[X] * 4, W) == 4 + 1
    assert peak_of(of_products, *[X] * 6, W) == 6


def test_kernels_are_in_the_order_that_takes_least() -> None:
    def late(x: Tensor, w: Tensor) -> Tensor:
        products = [linear(x, w), linear(x, w), linear(x, w), linear(x, w)]
        return torch.stack([product.sum() for product in products])

    assert peak_of(late, X, W) == 1


def test_a_cache_is_written_in_place() -> None:
    def step(cache: Tensor, rows: Tensor, x: Tensor, w: Tensor) -> Tensor:
        merged = torch.ops.aten.index_put(cache, [rows], linear(x, w))
        cache.copy_(merged)
        return merged.sum()

    assert peak_of(step, torch.zeros(1024, 128), torch.zeros(64, dtype=torch.int64), X, W) == 1
