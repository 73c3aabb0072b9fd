"""The numbers of fresh tokens as symbols: their range, and what happens if a compiler asks for
more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import toca_fx
from tests.helpers import make_inputs, make_policy, program_of, run_all, tiny
from tests.made_up_cuda import made_up_cuda
from tests.marks import slow_but
from toca_fx.capture.dynamo import capture

PINNED = {"R": {"base": 0.5, "step_weight": 0.9}, "scores": {"random": 1.0}}


class Asking:
    """A compiler that decides something by the number of fresh tokens, and then counts on it."""

    def __init__(self, decide: Callable[[Any], Any]) -> None:
        self.decide, self.compiled = decide, 0

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compiled += 1
        found = {
            (at, axis): bool(self.decide(size))
            for at, value in enumerate(inputs)
            if isinstance(value, Tensor)
            for axis, size in enumerate(value.shape)
            if isinstance(size, torch.SymInt)
        }

        def run(*given: Any) -> Any:
            assert all(
                bool(self.decide(given[at].shape[axis])) is answer
                for (at, axis), answer in found.items()
            )
            return module(*given)

        return run


@pytest.mark.parametrize(
    "decide",
    [
        lambda size: size == 8,
        *slow_but(
            [],
            [lambda size: size <= 20, lambda size: size % 8 == 0],
            "of what may be asked, one is enough",
        ),
    ],
    ids=["equal", "at most", "divides"],
)
def test_what_a_compiler_asks_for_is_compiled_for_those_numbers_alone(
    decide: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = tiny("diffusers", layers=2), make_inputs()
    with toca_fx.session():
        expected = run_all(toca_fx.compile(model, make_policy(**PINNED), inner="eager"), inputs)
    torch._dynamo.reset()
    inner = Asking(decide)
    with toca_fx.session() as run:
        outputs = run_all(toca_fx.compile(model, make_policy(**PINNED), inner=inner), inputs)
    assert all(map(torch.equal, outputs, expected))
    counts = {count for site in run.report().sites for count in site.computed}
    assert len(counts) > 6, "other numbers at every step"
    (message,) = [message for message in caplog.messages if "asks for" in message]
    assert "the number of fresh tokens of `transformer_blocks.0.ff`" in message
    assert "`R: {multiple: ...}`" in message


def test_beyond_some_numbers_steps_run_uncompiled() -> None:
    model, inputs = tiny("diffusers", layers=1), make_inputs(30)
    policy = make_policy(sampler={"steps": 30}, **PINNED)
    expected = run_all(toca_fx.compile(model, policy, inner="eager"), inputs)
    torch._dynamo.reset()
    inner = Asking(lambda size: size == 63)
    outputs = run_all(toca_fx.compile(model, policy, inner=inner), inputs)
    assert all(map(torch.equal, outputs, expected))
    per_graph = 1  # one block: its graphs are not cut
    assert (
        inner.compiled <= per_graph * (2 + 8) + 1
    )  # full, partial for some numbers, eight numbers; and what is hoisted


class Long(nn.Module):
    """A block whose MLP has so many tokens that some indices into its values need 64 bits."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].mlp = nn.Sequential(nn.Linear(8, hidden), nn.GELU(), nn.Linear(hidden, 8))

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (x + timestep * self.blocks[0].mlp(x),)


@pytest.mark.parametrize(
    ("hidden", "index"),
    slow_but([(512, "i64")], [(128, "i32"), (512, "i64")], "the usual width"),
)
def test_an_index_is_as_wide_as_any_number_of_tokens_needs(hidden: int, index: str) -> None:
    tokens = 2**23
    policy = make_policy(scores={"random": 1.0})
    with made_up_cuda():
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
            model = Long(hidden).requires_grad_(False)
            captured, inputs = capture(model, (torch.empty(1, tokens, 8), torch.empty(1)), {})
        program = program_of(captured, inputs, policy, "inductor")
        plan = program.analysis.plan(None)
        with made_up_cuda() as lowered:
            step = program.step(
                plan, next(step.modes for step in plan.steps if step.kind == "partial")
            )
    assert not step.conditions
    widths = {
        width
        for kernel in lowered.kernels
        for width in ("i32", "i64")
        if f"'xnumel': '{width}'" in kernel.source
    }
    assert index in widths
    assert ("i64" in widths) == (index == "i64"), "no wider than needed"
