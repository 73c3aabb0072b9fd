"""With N = 1 a compiled model is the model, bit for bit, whatever the call is made under."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import make_policy
from tests.marks import slow_but
from toca_fx.examples import build, examples, prediction, vary
from tools.coverage_table import REFUSED

STEPS = 2
NEVER = make_policy(sampler={"steps": STEPS}, N={"base": 1})


def channels_last(value: Tensor) -> Tensor:
    """The same numbers, with the channels [B, C, ...] next to each other in memory."""
    return value.movedim(1, -1).contiguous().movedim(-1, 1) if value.dim() > 2 else value


def bfloat16(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def as_is(value: Any) -> Any:
    return value


Situation = tuple[Callable[[Tensor], Tensor], Callable[[nn.Module], nn.Module], Callable[[], Any]]

# What becomes of tensors, of the model, and what the calls are made under.
SITUATIONS: dict[str, Situation] = {
    "nothing": (as_is, as_is, nullcontext),
    "autocast": (as_is, as_is, lambda: torch.autocast("cpu", torch.bfloat16)),
    "inference mode": (as_is, as_is, torch.inference_mode),
    "bfloat16": (bfloat16, nn.Module.bfloat16, nullcontext),
    "channels last": (channels_last, as_is, nullcontext),
}

# An image, a video and a sound; a model with regions of its own.
OFTEN = [
    *(("SD3Transformer2DModel", situation) for situation in SITUATIONS),
    ("WanTransformer3DModel", "autocast"),
    ("StableAudioDiTModel", "bfloat16"),
    ("MochiTransformer3DModel", "autocast"),
    ("MochiTransformer3DModel", "bfloat16"),
]

# What the first block reads is made contiguous for the compiler: sums are taken in another order.
REORDERED = {
    ("SanaTransformer2DModel", "bfloat16"),
    ("SanaVideoTransformer3DModel", "bfloat16"),
}


@pytest.mark.parametrize(
    ("name", "situation"),
    slow_but(
        OFTEN,
        [(name, each) for name in examples() if name not in REFUSED for each in SITUATIONS],
        "a handful of classes is enough",
    ),
)
def test_nothing_changes(name: str, situation: str) -> None:
    of_tensors, of_model, surroundings = SITUATIONS[situation]
    example = examples()[name]
    model, first = build(example)
    model = of_model(model)
    calls = [mapped(of_tensors, vary(example, first, step, STEPS)) for step in range(STEPS)]
    with torch.no_grad(), surroundings():
        try:
            expected = [prediction(model(**call))[0] for call in calls]
        except (RuntimeError, ValueError) as error:
            pytest.skip(f"the model itself cannot: {error}")
        compiled = toca_fx.compile(model, NEVER, inner="eager")
        with toca_fx.session(num_steps=STEPS):
            actual = [prediction(compiled(**call))[0].clone() for call in calls]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        if (name, situation) in REORDERED:
            assert (ours - theirs).abs().max() <= 2**-6 * theirs.abs().max()
        else:
            assert torch.equal(ours, theirs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(32), nn.Linear(32, 64)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, -1)
        return x + self.mlp(self.norm(x) * (1 + scale) + shift)


class Regions(nn.Module):
    """Tokens [B, N, 32] and a timestep [B]; autocast where ``outside``, ``timestep`` and ``blocks``
    say so (None: nothing is said).
    """

    def __init__(self, outside: bool | None, timestep: bool | None, blocks: bool | None) -> None:
        super().__init__()
        self.outside, self.timestep, self.inside = outside, timestep, blocks
        self.blocks, self.embedder = nn.ModuleList(Block() for _ in range(2)), nn.Linear(1, 32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with region(self.outside):
            with region(self.timestep):
                c = self.embedder(t[:, None])
            for block in self.blocks:
                with region(self.inside):
                    if self.inside is False:
                        x, c = x.float(), c.float()
                    x = block(x, c)
            return x


def region(enabled: bool | None) -> AbstractContextManager[Any]:
    if enabled is None:
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("memory", [1024, 0], ids=["hoisted", "in place"])
@pytest.mark.parametrize(
    ("around", "regions"),
    [
        (None, (True, None, None)),
        (None, (True, False, None)),
        (None, (True, None, False)),
        (True, (None, None, False)),
        (True, (False, None, True)),
    ],
)
def test_regions_are_kept(
    around: bool | None, regions: tuple[bool | None, bool | None, bool | None], memory: int
) -> None:
    """Full steps are the model, and features are kept in the dtype that the model has them in."""
    torch.manual_seed(0)
    model = Regions(*regions).eval()
    check_full_steps(model, around, memory, dtype=torch.float32)


def test_regions_bring_dtypes_together() -> None:
    """Weights in bfloat16 and a timestep in float32, as in Mochi."""
    torch.manual_seed(0)
    check_full_steps(Regions(True, None, None).bfloat16(), None, 1024, dtype=torch.bfloat16)


def check_full_steps(
    model: nn.Module, around: bool | None, memory: int, dtype: torch.dtype
) -> None:
    """Four calls, every other one full; partial ones follow the rows that they compute."""
    policy = make_policy(
        sampler={"steps": 4},
        N={"base": 2},
        modules={"mlp": {"weight": 1.0}},
        scores={"staleness": 1.0},
        hoisting={"memory": memory},
    )
    calls = [(torch.randn(2, 16, 32).to(dtype), torch.full((2,), 1 - s / 4)) for s in range(4)]
    with torch.no_grad(), region(around):
        expected = [model(*call) for call in calls]
        compiled = toca_fx.compile(model, policy, inner="eager")
        with toca_fx.session(num_steps=4):
            actual = [compiled(*call).clone() for call in calls]
        with toca_fx.session(timesteps=[1 - s / 4 for s in range(4)]):
            listed = [compiled(*call).clone() for call in calls]
    assert [output.dtype for output in actual] == [output.dtype for output in expected]
    for full in (0, 2):
        assert torch.equal(actual[full], expected[full])
        # For listed timesteps, hoisted values are computed in one batch, and rounded otherwise.
        assert (listed[full] - expected[full]).abs().max() <= 2**-6 * expected[full].abs().max()
    assert not torch.equal(actual[1], expected[1])


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(function, item) for item in value)
    return value
