"""Blocks that nobody adapted: attention in odd layouts is cached rightly, or not at all.

With all tokens fresh the result is the model's; a gather in the wrong place shows there. With half
of them it is that of a replay by hooks, which knows nothing of graphs: what is fresh is computed
from the present inputs, with fresh keys among remembered ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toca_fx
from tests.helpers import make_policy, newest, programs
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("keep_memories")

BATCH, TOKENS, WIDTH, HEADS = 2, 12, 16, 2
PARTIAL = {
    kind: {"weight": 1.0}
    for kind in ("self_attention", "cross_attention", "joint_attention", "mlp")
}

Attend = Callable[["Attention", Tensor], Tensor]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(self, x))


def usual(own: Attention, x: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(heads(own.q(x)), heads(own.k(x)), heads(own.v(x))))


def over_samples(own: Attention, x: Tensor) -> Tensor:
    """Samples are frames, say, and attend to each other."""
    return usual(own, x.transpose(0, 1)).transpose(0, 1)


def with_one_projection_for_queries_and_keys(own: Attention, x: Tensor) -> Tensor:
    shared = heads(own.q(x))
    return merged(F.scaled_dot_product_attention(shared, shared, heads(own.v(x))))


def with_one_projection_for_all(own: Attention, x: Tensor) -> Tensor:
    shared = heads(own.q(x))
    return merged(F.scaled_dot_product_attention(shared, shared, shared))


def with_keys_in_another_order(own: Attention, x: Tensor) -> Tensor:
    order = torch.arange(x.shape[1] - 1, -1, -1)
    return merged(
        F.scaled_dot_product_attention(
            heads(own.q(x)), heads(own.k(x)[:, order]), heads(own.v(x)[:, order])
        )
    )


def in_windows(own: Attention, x: Tensor) -> Tensor:
    return usual(own, x.reshape(BATCH * 3, TOKENS // 3, WIDTH)).reshape(BATCH, TOKENS, WIDTH)


def in_five_axes(own: Attention, x: Tensor) -> Tensor:
    query, key, value = (
        part(x).view(*x.shape[:2], 1, HEADS, -1).permute(0, 2, 3, 1, 4)
        for part in (own.q, own.k, own.v)
    )
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    return (weights @ value).permute(0, 3, 1, 2, 4).flatten(2)


def with_a_view_of_minus_one(own: Attention, x: Tensor) -> Tensor:
    query, key, value = (
        part(x).view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)
        for part in (own.q, own.k, own.v)
    )
    return (
        F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(*x.shape[:2], -1)
    )


def with_some_who_attend_to_nothing(own: Attention, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    mask[3] = False
    return merged(
        F.scaled_dot_product_attention(heads(own.q(x)), heads(own.k(x)), heads(own.v(x)), mask)
    )


LAYOUTS: tuple[Attend, ...] = (
    usual,
    over_samples,
    with_one_projection_for_queries_and_keys,
    with_one_projection_for_all,
    with_keys_in_another_order,
    in_windows,
    in_five_axes,
    with_a_view_of_minus_one,
    with_some_who_attend_to_nothing,
)


class Block(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention(attend)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(attend) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + timestep[:, None, None] / 1000
        for block in self.blocks:
            x = block(x)
        return x


def made(attend: Attend) -> nn.Module:
    torch.manual_seed(0)
    return Model(attend).double().eval().requires_grad_(False)


def calls(batch: int, steps: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(steps, batch, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return [
        {"x": x, "timestep": torch.full((batch,), 1000.0 - 100 * step, dtype=torch.float64)}
        for step, x in enumerate(latents)
    ]


def run(
    model: nn.Module, given: list[dict[str, Tensor]], inner: Any = "eager", **sections: Any
) -> tuple[list[Tensor], list[Any]]:
    """The outputs, and per call the tokens that each site picked: {path: [B, N] bool}."""
    torch._dynamo.reset()
    policy = make_policy(**{"sampler": {"steps": 6}, "modules": PARTIAL, **sections})
    fast = toca_fx.compile(model, policy, inner=inner)
    outputs, picked = [], []
    with torch.no_grad(), toca_fx.session() as session:
        for call in given:
            outputs.append(fast(**call).clone())
            (program,) = programs(session)
            buffers = newest(session)[1].buffers
            sites = program.analysis.matches.sites
            picked.append(
                {
                    sites[buffer.site].path: kept.clone()
                    for buffer, kept in buffers.items()
                    if buffer.role == "picked"
                }
            )
    return outputs, picked


@pytest.mark.parametrize("attend", LAYOUTS, ids=lambda attend: attend.__name__)
@pytest.mark.parametrize("batch", slow_but([BATCH], [1, BATCH], "one sample is a batch of less"))
def test_with_all_tokens_fresh_it_is_the_model(attend: Attend, batch: int) -> None:
    if attend is in_windows and batch == 1:
        pytest.skip("the windows are those of two samples")
    model, given = made(attend), calls(batch)
    with torch.no_grad():
        expected = [model(**call) for call in given]
    for sections in ({"R": {"base": 0.0}}, {"N": {"base": 1}}):
        outputs, _ = run(model, given, **sections)
        assert all(
            torch.allclose(ours, theirs, rtol=0, atol=1e-12)
            for ours, theirs in zip(outputs, expected, strict=True)
        )


class Replay:
    """The same by forward hooks: what stale tokens get is remembered, keys and values of usual
    attention among it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.fresh: dict[str, Tensor | None] = {}
        self.known: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name.endswith((".attn", ".mlp")):
                module.register_forward_hook(
                    lambda _, __, output, name=name: self.merged(name, name, output)
                )
            elif name.endswith((".k", ".v")):
                site = name.rpartition(".")[0]
                module.register_forward_hook(
                    lambda _, __, output, name=name, site=site: self.merged(name, site, output)
                )

    def merged(self, name: str, site: str, output: Tensor) -> Tensor:
        fresh = self.fresh.get(site)
        self.known[name] = (
            output if fresh is None else torch.where(fresh[..., None], output, self.known[name])
        )
        return self.known[name]


@pytest.mark.parametrize(
    "attend",
    [usual, with_a_view_of_minus_one, with_some_who_attend_to_nothing],
    ids=lambda attend: attend.__name__,
)
def test_with_half_of_them_it_is_the_replay(attend: Attend) -> None:
    model, given = made(attend), calls(BATCH)
    outputs, picked = run(model, given)
    replay = Replay(model)
    for step, (call, output) in enumerate(zip(given, outputs, strict=True)):
        replay.fresh = {} if step % 3 == 0 else picked[step]
        with torch.no_grad():
            assert torch.allclose(model(**call), output, rtol=0, atol=1e-12), f"step {step}"
        assert step % 3 == 0 or all(
            int(rows.sum()) == BATCH * TOKENS // 2 for rows in picked[step].values()
        )


@pytest.mark.parametrize(
    "attend",
    slow_but(
        [usual, with_a_view_of_minus_one],
        [attend for attend in LAYOUTS if attend is not over_samples],
        "of the layouts, two are enough for shares from all to none",
    ),
    ids=lambda attend: attend.__name__,
)
def test_any_share_of_fresh_tokens_runs(attend: Attend) -> None:
    """From all of them down to none, of which the kernels know nothing."""
    model, given = made(attend), calls(BATCH)
    outputs, picked = run(model, given, R={"base": 0.5, "step_weight": 1.0})
    assert all(output.isfinite().all() for output in outputs)
    assert len({int(rows.sum()) for step in picked for rows in step.values()}) > 2


@pytest.mark.slow(reason="inductor at K = 0, as test_inductor.py has it for MLPs")
def test_no_query_at_all_under_inductor() -> None:
    model, given = made(usual), calls(BATCH)
    sections: dict[str, Any] = {"R": {"base": 0.9, "step_weight": -1.0}, "scores": {"random": 1.0}}
    (ours, _), (theirs, _) = (
        run(model, given, inner, **sections) for inner in ("inductor", "eager")
    )
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(ours, theirs, strict=True))


class SequenceFirst(nn.Module):
    """What ``nn.MultiheadAttention`` expects unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(over_samples) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x.transpose(0, 1) + timestep[:, None] / 1000
        for block in self.blocks:
            x = block(x)
        return x.transpose(0, 1)


def test_samples_are_not_taken_for_tokens() -> None:
    torch.manual_seed(0)
    explained = toca_fx.explain(
        SequenceFirst().eval().requires_grad_(False),
        make_policy(),
        **{k: v.float() for k, v in calls(BATCH)[0].items()},
    )
    assert explained.sites == ()
    assert {miss.reason for miss in explained.skipped} == {
        "its output has shape (12, 2, 16): [tokens, batch, channels], not [batch, tokens, channels]"
    }


def test_models_with_a_parameter_in_common_keep_their_caches_apart() -> None:
    one, other = made(usual), made(usual)
    other.blocks[0].norm1 = one.blocks[0].norm1  # type: ignore[union-attr,index]
    with torch.no_grad():
        for parameter in other.blocks[1].parameters():  # type: ignore[union-attr,index]
            parameter.mul_(2)
        expected = other(**calls(BATCH)[0])
    policy = make_policy(sampler={"steps": 6})
    first, second = (toca_fx.compile(model, policy, inner="eager") for model in (one, other))
    with torch.no_grad(), toca_fx.session():
        for call in calls(BATCH)[:2]:
            first(**call)
        assert torch.allclose(second(**calls(BATCH)[0]), expected, rtol=0, atol=1e-12), (
            "its first step is full"
        )


def test_a_returned_feature_is_not_written_to_by_later_steps() -> None:
    class Returning(Model):
        def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x = x + timestep[:, None, None] / 1000
            feature = self.blocks[0].attn(x)
            x = x + feature
            return x + self.blocks[1].mlp(x), feature

    torch.manual_seed(0)
    fast = toca_fx.compile(
        Returning(usual).double().eval(), make_policy(sampler={"steps": 6}), inner="eager"
    )
    kept, copies = [], []
    with torch.no_grad(), toca_fx.session():
        for call in calls(BATCH):
            kept.append(fast(**call)[1])
            copies.append(kept[-1].clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[3])
