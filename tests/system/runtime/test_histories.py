"""Histories over a run: lost ones begin anew, what was never written is not read, generations and
samples do not see each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import make_inputs, newest, programs, run_all, tiny
from tests.marks import slow_but
from tests.reference import ReferenceSampler
from tests.system.runtime.generations import Flaky
from tests.system.runtime.grains import GRAINS, TOLERANCE, captured, of_grain, run, same
from toca_fx.lower.program import Program
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import Plan

pytestmark = pytest.mark.usefixtures("keep_memories")

TWO = ["tokens", "model"]


@pytest.mark.parametrize("grain", [grain for grain in GRAINS if grain != "block"])
@pytest.mark.parametrize("how", ["forgotten", "after a failure", "after no numbers"])
@pytest.mark.parametrize("at", slow_but([4], [4, 6], "one step is enough"))
def test_lost_memories_begin_anew(grain: str, how: str, at: int) -> None:
    """Ahead of call ``at``, on a partial or a full step: it is full, and the order begins at 0."""
    model, twin = captured()
    policy, flaky = of_grain(grain), Flaky()
    fast, reference = twin.compile(policy, inner=flaky), ReferenceSampler(model, policy)
    full = [call for call in range(at) if twin.plan(policy).steps[call].kind == "full"]
    bad = full[-1:] if how == "after no numbers" else []
    with toca_fx.session(num_steps=12) as session:
        for call, (x, *rest) in enumerate(make_inputs(dtype=torch.float64)):
            given = torch.full_like(x, torch.nan) if call in bad else x
            inputs = [given if is_like(each, x) else each for each in twin.inputs[call]]
            if call == at and how == "after a failure":
                flaky.fails = True
                with pytest.raises(RuntimeError, match="out of luck"):
                    fast(inputs)
                flaky.fails = False
            elif call == at:
                session.invalidate()
            output = fast(inputs)
            reference.lost = call == at
            with torch.no_grad():
                wanted = reference.step(given, *rest)
            if min(bad, default=at) <= call < at:
                assert not wanted.isfinite().all()
            else:
                error = (output - wanted).abs().max()
                assert error <= TOLERANCE * wanted.abs().max(), call
    assert session.report().steps[at].kind == "full"


def is_like(value: Any, x: Tensor) -> bool:
    """Whether an input is the latents."""
    return isinstance(value, Tensor) and value.shape == x.shape


def poison(buffers: Mapping[Buffer, Tensor]) -> None:
    """Write no numbers wherever a number could be."""
    for value in buffers.values():
        if value.is_floating_point():
            value.fill_(torch.nan)


@pytest.mark.parametrize("grain", GRAINS)
def test_what_memory_held_before_is_not_read(grain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as the allocator gives it, and that of a generation that is over."""
    _, twin = captured()
    fast = twin.compile(of_grain(grain))
    expected = run(fast, twin.inputs)
    zeros, empty = Program.new_buffers, torch.empty

    def unwritten(program: Program, plan: Plan) -> dict[Buffer, Tensor]:
        def with_nan(*sizes: Any, **options: Any) -> Tensor:
            return empty(*sizes, **options).fill_(torch.nan)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", with_nan)
            return zeros(program, plan)

    monkeypatch.setattr(Program, "new_buffers", unwritten)
    with toca_fx.session(num_steps=12) as session:
        found = [fast(each).clone() for each in twin.inputs]
        generation, storage = newest(session)
    assert same(found, expected)
    poison(storage.buffers)
    generation.runner._idle[storage.key] = [storage]
    with toca_fx.session(num_steps=12) as session:
        found = [fast(each).clone() for each in twin.inputs]
        assert newest(session)[1] is storage
    assert same(found, expected)


@pytest.mark.parametrize("grain", slow_but(TWO, GRAINS, "two grains are enough"))
def test_a_sample_in_a_batch_equals_the_sample_alone(grain: str) -> None:
    policy = of_grain(grain)
    (_, three), (_, one) = captured(batch=3), captured(batch=1)
    fast, together = one.compile(policy), run(three.compile(policy), three.inputs)
    for sample in range(3):
        inputs = [
            [each if isinstance(each, nn.Parameter) else row_of(each, sample) for each in step]
            for step in three.inputs
        ]
        for all_samples, output in zip(together, run(fast, inputs), strict=True):
            error = (all_samples[sample : sample + 1] - output).abs().max()
            assert error <= TOLERANCE * output.abs().max()


def row_of(value: Any, sample: int) -> Any:
    batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == 3
    return value[sample : sample + 1] if batched else value


@pytest.mark.parametrize("grain", GRAINS)
def test_generations_do_not_see_each_other(grain: str) -> None:
    """One after the other, step by step in turn, and as branches of one run."""
    _, twin = captured()
    fast = twin.compile(of_grain(grain))
    images = twin.inputs, [shifted(each) for each in twin.inputs]
    alone = [run(fast, inputs) for inputs in images]
    assert not same(*alone)
    assert same(run(fast, images[0]), alone[0])
    sessions = [toca_fx.session(num_steps=12) for _ in images]
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(each) for each in sessions]
        for call in range(12):
            for session, inputs, expected in zip(runs, images, alone, strict=True):
                with session:
                    assert torch.equal(fast(inputs[call]), expected[call])
    with toca_fx.session(num_steps=12):
        for call in range(12):
            for name, inputs, expected in zip("ab", images, alone, strict=True):
                with toca_fx.branch(name):
                    assert torch.equal(fast(inputs[call]), expected[call])


def shifted(inputs: list[Any]) -> list[Any]:
    """Those of another image."""
    return [
        each + 1 if isinstance(each, Tensor) and each.shape == (2, 4, 16, 16) else each
        for each in inputs
    ]


@pytest.mark.parametrize("grain", slow_but(["module"], GRAINS, "one grain is enough"))
def test_a_generation_goes_on_when_the_model_is_captured_again(grain: str) -> None:
    """Its latents lie otherwise from a partial step on."""
    model, inputs = tiny("diffusers", layers=1).double(), list(make_inputs(dtype=torch.float64))
    fast = toca_fx.compile(model, of_grain(grain), inner="eager")
    with toca_fx.session(num_steps=12):
        expected = run_all(fast, inputs)
    moved = [
        (x.contiguous(memory_format=torch.channels_last) if call > 4 else x, t, y)
        for call, (x, t, y) in enumerate(inputs)
    ]
    with toca_fx.session(num_steps=12) as session:
        found = run_all(fast, moved)
    for output, wanted in zip(found, expected, strict=True):
        assert (output - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    assert len(programs(session)) == 2


@pytest.mark.parametrize("grain", slow_but(TWO, GRAINS, "two grains are enough"))
def test_values_in_bfloat16_are_summed_in_the_models_precision(grain: str) -> None:
    """Then an error is no larger than what the weights make of the rounding of the values."""
    _, twin = captured()
    policy = of_grain(grain, scores={"random": 1.0})
    rounded = replace(policy, cache=replace(policy.cache, dtype="bfloat16"))
    outputs = [run(twin.compile(each), twin.inputs) for each in (policy, rounded)]
    kinds = [step.kind for step in twin.plan(policy).steps]
    for kind, output, wanted in zip(kinds, outputs[1], outputs[0], strict=True):
        error = float((output - wanted).abs().max() / wanted.abs().max())
        assert error <= 1e-12 if kind == "full" else 1e-5 < error < 20 * 2**-8
