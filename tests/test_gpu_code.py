"""Every kind of step, lowered for a GPU that is not there: no size is guarded, and the kernels are those that are expected."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import make_policy
from tests.made_up_cuda import Lowered, fake_example, made_up_cuda
from toca_fx.capture import capture
from toca_fx.inner import Inner
from toca_fx.integrations.diffusers import examples
from toca_fx.program import CompiledStep, Program

MODELS = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel", "LatteTransformer3DModel")
DTYPES = ("float32", "bfloat16")


@torch.no_grad()
def lower(model: str, dtype: str) -> tuple[dict[str, CompiledStep], dict[str, Lowered]]:
    """The steps of a generation by kind, and what was lowered for each."""
    policy = make_policy()
    steps: dict[str, CompiledStep] = {}
    found: dict[str, Lowered] = {}
    with made_up_cuda():
        with FakeTensorMode(allow_non_fake_inputs=True):
            module, call = fake_example(examples()[model], getattr(torch, dtype))
            captured, inputs = capture(module, (), call)
        program = Program(captured, inputs, policy, Inner())
        plan = program.plan(None)
        for step in plan.steps:
            if step.kind not in steps:
                with made_up_cuda() as found[step.kind]:
                    steps[step.kind] = program.step(plan, step.modes)
    return steps, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_no_size_is_guarded(model: str, dtype: str) -> None:
    steps, found = lower(model, dtype)
    assert set(steps) == {"full", "partial"}
    for kind, step in steps.items():
        assert not step._shapes.guards, kind
        assert found[kind].kernels, kind
