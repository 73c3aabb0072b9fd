"""However attention and MLP are spelled: computing all tokens anew changes nothing, half of them is
less work. That they are found is a test of tests/graph.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import make_policy
from tests.marks import slow_but
from tests.spellings.attentions import ATTENTIONS, MIXES, Mix, scaled_product, sdpa
from tests.spellings.mlps import FLOAT32, MLPS, LoRA
from tests.spellings.models import JOINS, MODELS, Block, Model, Shared, make
from tests.spellings.sizes import BLOCKS, STEPS, TOKENS
from toca_fx.runtime.report import Report

# Every day: the kernel and a product, a gate and adapters.
OFTEN = (sdpa, scaled_product, "geglu", "lora")
REASON = "of the spellings, some are enough; tests/graph finds them all"


def generate(
    model: nn.Module, steps: list[Tensor], base: float, attention: Any
) -> tuple[list[Tensor], Report]:
    torch._dynamo.reset()
    modules = {"self_attention": attention, "mlp": {"weight": 1.0}}
    fast = toca_fx.compile(
        model,
        make_policy(sampler={"steps": STEPS}, R={"base": base}, modules=modules),
        inner="eager",
    )
    with torch.no_grad(), toca_fx.session(num_steps=STEPS) as run:
        outputs = [fast(x).clone() for x in steps]
    return outputs, run.report()


def check(
    model: nn.Module, steps: list[Tensor], *, attention: Any = "compute", saves: bool = True
) -> None:
    """All tokens fresh is the model; half of them is less work."""
    tolerance = 1e-10 if steps[0].dtype == torch.float64 else 1e-5
    outputs, whole = generate(model, steps, 0.0, attention)
    for step, (x, ours) in enumerate(zip(steps, outputs, strict=True)):
        assert (ours - model(x)).abs().max() <= tolerance, f"step {step}"
    outputs, half = generate(model, steps, 0.5, attention)
    assert all(ours.isfinite().all() for ours in outputs)
    assert (outputs[1] - model(steps[1])).abs().max() > 1e-6
    mlps = [site for site in half.sites if site.kind == "mlp"]
    assert [site.computed for site in mlps] == [(TOKENS, TOKENS // 2, TOKENS // 2) * 2] * BLOCKS
    if saves:
        assert half.flops_done < whole.flops_done


@pytest.mark.parametrize("mix", slow_but(OFTEN, MIXES, REASON), ids=lambda mix: mix.__name__)
@pytest.mark.parametrize("attention", ["compute", "partial"])
def test_attention_spelled_as(mix: Mix, attention: str) -> None:
    check(*make(mix=mix), attention={"weight": 1.0} if attention == "partial" else attention)


@pytest.mark.parametrize("name", slow_but(["multihead with its map"], ATTENTIONS, REASON))
@pytest.mark.parametrize("attention", ["compute", "partial"])
def test_attention_of(name: str, attention: str) -> None:
    model, steps = make(attention=ATTENTIONS[name])
    check(model, steps, attention={"weight": 1.0} if attention == "partial" else attention)


@pytest.mark.parametrize("name", slow_but(OFTEN, MLPS, REASON))
def test_mlp_spelled_as(name: str) -> None:
    dtype = torch.float32 if name in FLOAT32 else torch.float64
    check(*make(dtype, mlp=MLPS[name]), saves=name != "conv2d")


class Recorded:
    """What attentions and MLPs return, call by call: recorded on full steps, else returned."""

    def __init__(self, model: nn.Module) -> None:
        self.full, self.outputs, self.at = True, [], 0
        for module in model.modules():
            if isinstance(module, Block):
                module.attention.register_forward_hook(self)
                module.mlp.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.full:
            self.outputs.append(output)
        self.at += 1
        return self.outputs[self.at - 1]

    def step(self, full: bool) -> None:
        self.full, self.at = full, 0
        if full:
            self.outputs.clear()


def check_reuse(model: nn.Module, steps: list[Tensor]) -> None:
    """Each module reuses what the same call of it returned on the last full step."""
    torch._dynamo.reset()
    policy = make_policy(
        sampler={"steps": STEPS}, modules={"self_attention": "reuse", "mlp": "reuse"}
    )
    fast = toca_fx.compile(copy.deepcopy(model), policy, inner="eager")
    recorded = Recorded(model)
    with torch.no_grad(), toca_fx.session(num_steps=STEPS) as run:
        for step, x in enumerate(steps):
            recorded.step(full=step % 3 == 0)
            assert (fast(x) - model(x)).abs().max() <= 1e-10, f"step {step}"
    assert run.report().flops_done < run.report().flops_uncached / 2


@pytest.mark.parametrize("kind", slow_but([Shared], MODELS, REASON), ids=lambda kind: kind.__name__)
def test_modules_of_blocks_of(kind: type[Model]) -> None:
    check_reuse(*make(kind=kind))


@pytest.mark.parametrize("name", slow_but(["lerp"], JOINS, REASON))
def test_modules_joined_by(name: str) -> None:
    check_reuse(*make(join=JOINS[name]))


@pytest.mark.parametrize("name", slow_but(["lerp", "scaled sum"], JOINS, REASON))
def test_residual_spelled_as(name: str) -> None:
    check(*make(join=JOINS[name]))


@pytest.mark.parametrize("kind", slow_but([Shared], MODELS, REASON), ids=lambda kind: kind.__name__)
def test_blocks_of(kind: type[Model]) -> None:
    check(*make(kind=kind), attention={"weight": 1.0})


@pytest.mark.parametrize("attention", slow_but(["partial"], ["compute", "partial"], REASON))
def test_low_rank_projections_of_an_attention(attention: str) -> None:
    check(*make(linear=LoRA), attention={"weight": 1.0} if attention == "partial" else attention)
