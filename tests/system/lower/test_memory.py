"""The predicted peak against what inductor's code allocates, run on fake tensors for a GPU that is
not there, and against an H100.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toca_fx
from tests.helpers import analysis_of
from tests.made_up_cuda import fake_example, made_up_cuda
from tests.marks import slow_but
from toca_fx import load_policy
from toca_fx.capture.dynamo import capture
from toca_fx.examples import PRESETS, build
from toca_fx.lower import memory
from toca_fx.lower.analysis import Analysis
from toca_fx.lower.compiler import Inner
from toca_fx.lower.memory import allocated, predict, step_peak
from toca_fx.lower.step import CompiledStep
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.rewrite.tensors import Tensors

MIB = 2**20

# Real widths and few blocks; two equal ones make pieces of a graph.
BLOCKS: dict[str, dict[str, int]] = {
    "dit-xl-2-256": {"num_layers": 3},
    "pixart-alpha-256": {"num_layers": 3},
    "latte-256": {"num_layers": 2},
    "flux-dev-1024": {"num_layers": 2, "num_single_layers": 2},
}
CASES: list[tuple[str, str, set[str]]] = [
    ("dit-xl-2-256", "reference/toca-dit-xl-2", {"full", "partial"}),
    ("dit-xl-2-256", "reference/taylorseer-dit", {"full", "partial"}),
    ("dit-xl-2-256", "reference/duca-dit", {"full", "mixed", "partial", "skip"}),
    ("dit-xl-2-256", "dit-xl-2", {"full", "skip"}),
    ("pixart-alpha-256", "reference/toca-pixart-alpha", {"full", "partial"}),
    ("latte-256", "reference/toca-video", {"full", "partial"}),
    ("flux-dev-1024", "reference/toca-flux-dev", {"full", "partial"}),
    ("flux-dev-1024", "reference/taylorseer-flux", {"full", "partial"}),
    ("flux-dev-1024", "reference/spectrum-flux", {"full", "skip"}),
]


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


def analysis(preset: str, policy: str) -> tuple[Analysis, list[Any], FakeTensorMode]:
    """A preset with few blocks on the GPU, its inputs, and the mode that they are fake tensors
    of.
    """
    config, example = BLOCKS[preset], PRESETS[preset]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        module, call = fake_example(
            dataclasses.replace(example, config={**example.config, **config}), torch.bfloat16
        )
        captured, inputs = capture(module, (), call)
    return analysis_of(captured, inputs, load_policy(policy)), inputs, mode


def simulated(
    found: Analysis, plan: Plan, step: StepPlan, inputs: list[Any], mode: FakeTensorMode
) -> int:
    """Bytes that a compiled step allocates at its peak, called as a generation calls it."""
    compiled = CompiledStep(found.step_graph(plan, step.modes), found.aten, plan, Inner())
    made, allocator = Tensors(found.aten, plan), Allocator()
    with mode:
        tensors = {
            buffer: made.example(buffer, step.fresh[buffer.site])
            for buffer in compiled.graph.buffers
        }
        allocator.ignore((inputs, tensors))
        with allocator:
            compiled(inputs, tensors)
    assert allocator.now == 0
    return allocator.peak


@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "policy", "kinds"),
    slow_but(
        [CASES[0], CASES[3]], CASES, "real widths lowered for a GPU; of each method one is enough"
    ),
)
def test_what_compiled_steps_allocate(preset: str, policy: str, kinds: set[str]) -> None:
    with code_on_fakes():
        found, inputs, mode = analysis(preset, policy)
        plan = found.plan(None)
        found.flops(plan)
        peak = predict(found, plan)
        steps = {step.modes: memory._worst(plan, step.modes) for step in plan.steps}
        assert {step.kind for step in steps.values()} == kinds
        worst = 0
        for modes, step in steps.items():
            counted = found.costs(plan)[modes]
            fresh = {i: (step.fresh[i], site.tokens) for i, site in enumerate(plan.sites)}
            told = step_peak(counted.graph.module.graph, counted.values(), fresh)
            seen = simulated(found, plan, step, inputs, mode)
            assert told == pytest.approx(seen, rel=0.03), step.kind
            worst = max(worst, seen)
    assert peak.kept + peak.hoisted + peak.step == pytest.approx(
        peak.kept + peak.hoisted + worst, rel=0.03
    )


@pytest.mark.slow(reason="FLUX.1-dev with all of its blocks")
def test_what_an_h100_allocated() -> None:
    """torch 2.11, bfloat16, a session that was told its timesteps: max_memory_allocated less what
    was allocated before.
    """
    model, inputs = build(PRESETS["flux-dev-1024"], device="meta", dtype=torch.bfloat16)
    told = toca_fx.explain(model, "reference/toca-flux-dev", **inputs)
    assert told.peak_bytes + told.listed_bytes == pytest.approx(3584 * MIB, rel=0.01)
    assert told.cache_bytes + told.hoisted_bytes + told.step_bytes < told.peak_bytes
    (line,) = (line for line in str(told).splitlines() if line.startswith("memory"))
    assert f"{told.peak_bytes / MIB:.1f} MiB at the peak" in line
    assert f"{told.listed_bytes / MIB:.1f} more if the session is told its timesteps" in line
