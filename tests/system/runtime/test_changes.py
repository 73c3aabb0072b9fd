"""What changes between and within runs: weights, layouts, shapes, models."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import Call, call, make_inputs, make_policy, run_all, tiny
from tests.marks import slow_but
from tests.system.runtime.generations import fast_twin, in_session, same, uncached
from toca_fx.runtime.models import Models

STEPS = 6
KINDS = ["full", "partial", "partial"] * 2


def twin_of(model: nn.Module, **sections: Any) -> nn.Module:
    return fast_twin(model, **{"sampler": {"steps": STEPS}, **sections})


def scale(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def through_data(weight: nn.Parameter) -> None:
    weight.data += 0.3


def new_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.5


def through_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[...] += 0.2


def through_dlpack(weight: nn.Parameter) -> None:
    torch.from_dlpack(weight.detach()).add_(0.2)


WRITES = (scale, through_data, new_data, through_numpy, through_dlpack)
TOLD = ("timesteps", "number", "nothing")
# Each write to a weight that is hoisted and to one that is not, told in turn in one of three ways.
OFTEN = [
    (TOLD[(at + hoisted) % 3], hoisted, write)
    for at, write in enumerate(WRITES)
    for hoisted in (True, False)
]


@pytest.mark.parametrize(
    ("told", "hoisted", "write"),
    slow_but(
        OFTEN, itertools.product(TOLD, (True, False), WRITES), "each write in one way to tell"
    ),
)
def test_a_write_to_a_weight_is_seen(told: str, hoisted: bool, write: Any) -> None:
    """In the middle of a run, and between two: N = 1 is the model as it is now."""
    model, calls = tiny("original", layers=1).double(), double(STEPS)
    block = model.blocks[0]  # type: ignore[union-attr,index]
    weight = block.adaLN_modulation[1].weight if hoisted else block.mlp.fc2.weight
    fast = twin_of(model, N={"base": 1})
    listed = [float(t[0]) for _, t, _ in calls]
    for _ in range(2):
        session: Any = {
            "timesteps": lambda: toca_fx.session(timesteps=listed),
            "number": lambda: toca_fx.session(STEPS),
            "nothing": contextlib.nullcontext,
        }[told]()
        with session, torch.no_grad():
            for number, step in enumerate(calls):
                if number == 3:
                    write(weight)
                assert (call(fast, *step) - call(model, *step)).abs().max() < 1e-10, number
        write(weight)


def double(steps: int, seed: int = 0) -> list[Call]:
    return list(make_inputs(steps, seed=seed, dtype=torch.float64))


def test_the_step_after_invalidate_is_full(model: nn.Module) -> None:
    fast, calls = twin_of(model), list(make_inputs(STEPS))
    with toca_fx.session(STEPS) as run:
        run_all(fast, calls[:2])
        run.invalidate()
        run_all(fast, calls[2:])
    kinds = [step.kind for step in run.report().steps]
    assert kinds == ["full", "partial", "full", "full", "partial", "partial"]


def test_a_replaced_parameter_is_another_model(model: nn.Module) -> None:
    fast, calls = twin_of(model), list(make_inputs(STEPS))
    linear = model.blocks[0].mlp.fc2  # type: ignore[union-attr,index]
    with toca_fx.session(STEPS) as run:
        before = run_all(fast, calls[:2])
        linear.weight = nn.Parameter(linear.weight * 1.5, requires_grad=False)
        after = run_all(fast, calls[2:])
    assert not uncached(model, calls[1], before[1])
    assert uncached(model, calls[2], after[0])
    kinds = [step.kind for step in run.report().steps]
    assert kinds == ["full", "partial", "full", "partial", "partial", "full"]


def test_models_are_forgotten_with_their_weights() -> None:
    models, kept = Models(), torch.zeros(1)
    keys = []
    for _ in range(300):
        weight = torch.zeros(1)
        keys.append(models.key([kept, weight]))
        assert models.key([kept, weight]) is keys[-1]
        assert models.key([weight]) is keys[-1], "a call that reads less of it"
    assert len(set(keys)) == 300
    assert len(models) == 2
    del weight
    assert len(models) == 0
    shared = [torch.zeros(1) for _ in range(2)]
    assert models.key([kept, shared[0]]) is not models.key([kept, shared[1]])
    assert models.key([kept]) not in (models.key([kept, each]) for each in shared), "of either"


class Block(nn.Module):
    """Attention and an MLP on tensors that are buffers, as quantised linears keep them."""

    def __init__(self, state: type[nn.Buffer] | type[nn.Parameter]) -> None:
        super().__init__()
        for name, shape in {
            "qkv": (96, 32),
            "out": (32, 32),
            "up": (64, 32),
            "down": (32, 64),
        }.items():
            setattr(self, name, state(torch.randn(shape, dtype=torch.float64) / 6))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        linear = nn.functional.linear
        normed = nn.functional.layer_norm(x, (32,)) * (1 + c)
        q, k, v = linear(normed, self.qkv).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + linear(mixed.transpose(1, 2).flatten(2), self.out)
        normed = nn.functional.layer_norm(x, (32,)) * (1 + c)
        return x + linear(nn.functional.gelu(linear(normed, self.up)), self.down)


class Blocks(nn.Module):
    """A model whose graph may break behind the embedding of its timestep."""

    def __init__(self, state: Any = nn.Buffer, breaks: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([Block(state) for _ in range(2)])
        self.labels = state(torch.randn(10, 32, dtype=torch.float64))
        self.breaks = breaks

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        c = (self.labels[y] * timestep[:, None].cos())[:, None]
        if self.breaks:
            torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x, c)
        return x


def tokens(seed: int, label: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator, y = torch.Generator().manual_seed(seed), torch.tensor([label])
    return [
        (
            torch.randn(1, 16, 32, generator=generator, dtype=torch.float64),
            torch.tensor([5.0 - number], dtype=torch.float64),
            y,
        )
        for number in range(STEPS)
    ]


POLICY = make_policy(sampler={"steps": STEPS}, scores={"staleness": 1.0})


def image(fast: Any, calls: Any, session: bool = True) -> list[Tensor]:
    with toca_fx.session(STEPS) if session else contextlib.nullcontext(), torch.no_grad():
        return [fast(*step).clone() for step in calls]


@pytest.mark.parametrize("how", ["buffers", "functional_call"])
def test_models_without_parameters_have_memories_of_their_own(
    how: str,
) -> None:
    state = nn.Parameter if how == "functional_call" else nn.Buffer
    models = [Blocks(state, seed=seed).eval().requires_grad_(False) for seed in (1, 2)]

    def twins() -> list[Any]:
        torch._dynamo.reset()
        if how != "functional_call":
            return [toca_fx.compile(model, POLICY, inner="eager") for model in models]
        skeleton = Blocks(nn.Parameter).requires_grad_(False)
        options = {"policy": POLICY, "inner": "eager"}

        def run(weights: Any, *step: Tensor) -> Tensor:
            return torch.func.functional_call(skeleton, weights, step)

        compiled = torch.compile(run, backend="toca", options=options, fullgraph=True)
        states = [dict(model.named_parameters()) for model in models]
        return [lambda *step, state=state: compiled(state, *step) for state in states]

    calls = [tokens(1), tokens(2)]
    found: list[list[Tensor]] = [[], []]
    expected = [image(twins()[at], calls[at]) for at in range(2)]
    fast = twins()
    with toca_fx.session(STEPS) as run, torch.no_grad():
        for number in range(STEPS):
            for at in range(2):
                found[at].append(fast[at](*calls[at][number]).clone())
    assert all(map(same, found, expected))
    assert [step.kind for step in run.report().steps].count("partial") == 2 * KINDS.count("partial")


def test_the_parts_of_a_broken_graph_share_one_clock() -> None:
    whole = Blocks(nn.Parameter).eval().requires_grad_(False)
    broken = Blocks(nn.Parameter, breaks=True).eval().requires_grad_(False)
    images = [tokens(seed, label=seed) for seed in range(3)]
    expected = [image(toca_fx.compile(whole, POLICY, inner="eager"), each) for each in images]
    torch._dynamo.reset()
    options = {"policy": POLICY, "inner": "eager"}
    fast = torch.compile(broken, backend="toca", options=options)
    assert all(same(image(fast, each), own) for each, own in zip(images, expected, strict=True))
    with toca_fx.session(STEPS) as run, torch.no_grad():
        for step in images[0][:2]:
            fast(*step)
        assert same([fast(*images[1][0])], expected[1][:1]), "another image begins"
    assert any("captured in several graphs" in warning for warning in run.report().warnings)
    image(fast, images[0], session=False)
    for each, own in zip(images, expected, strict=True):
        assert same(image(fast, each, session=False), own), "recognised"


@pytest.mark.parametrize("layout", ["channels last", "a view", "transposed"])
def test_latents_may_lie_otherwise_after_the_first_step(model: nn.Module, layout: str) -> None:
    def moved(x: Tensor) -> Tensor:
        if layout == "channels last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "a view":
            return torch.cat([x, x], 1)[:, : x.shape[1]]
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    fast, calls = twin_of(model), list(make_inputs(STEPS))
    expected = in_session(fast, calls, STEPS)  # type: ignore[arg-type]
    with toca_fx.session(STEPS) as run:
        found = run_all(fast, [calls[0], *((moved(x), t, y) for x, t, y in calls[1:])])
    assert same(found, expected)
    assert [step.kind for step in run.report().steps] == KINDS


def test_a_policy_that_does_not_fit_ends_no_run(model: nn.Module) -> None:
    """Its steps are listed, and the second image of the session has another number of them."""
    fast = twin_of(model, N={"full_steps": [0, 3]})
    first, second = list(make_inputs(STEPS)), list(make_inputs(4, seed=1))
    run_all(fast, second)  # nobody tells of how many: full steps
    with toca_fx.session(STEPS) as run:
        run_all(fast, first[:4])
        found = run_all(fast, second)
    assert all(uncached(model, step, output) for step, output in zip(second, found, strict=False))
    assert any("does not fit the shapes" in warning for warning in run.report().warnings)
    assert [step.kind for step in run.report().steps][:4] == KINDS[:4]
    assert run.report().flops_done > 0


def test_what_caches_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.linear(x) + timestep[:, None]

    fast = toca_fx.compile(Plain().requires_grad_(False), POLICY, inner="eager")
    with torch.no_grad():
        fast(torch.ones(2, 4), torch.ones(2))
    said = [message for message in caplog.messages if message.startswith("toca_fx: ")]
    assert len([message for message in said if "no attention or MLP" in message]) == 1
