"""Linear layers of few rows: the same numbers from either library, and which layers of which steps
decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

import toca_fx
from tests.helpers import make_inputs, make_policy, programs, run_all, tiny


@pytest.mark.slow(reason="inductor under autocast")
def test_autocast_gets_what_it_casts() -> None:
    """The operator is unknown to it."""
    model, outputs = tiny("original", layers=1), []
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        with toca_fx.session(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(
                run_all(
                    toca_fx.compile(model, make_policy(scores={"random": 1.0}), inner=inner),
                    make_inputs(),
                )
            )
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours.float() - theirs.float()).abs().max() < 0.05 * theirs.float().abs().max()


def test_inductor_gets_the_operator_and_flops_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    inductor = lookup_backend("inductor")

    def noting(module: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        seen.extend(node.target for node in module.graph.nodes)
        return inductor(module, inputs, **options)

    monkeypatch.setattr(
        "toca_fx.lower.compiler.lookup_backend",
        lambda name: noting if name == "inductor" else lookup_backend(name),
    )
    model, flops, outputs = tiny("original", layers=2), [], []
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        with toca_fx.session() as run:
            outputs.append(
                run_all(
                    toca_fx.compile(model, make_policy(scores={"random": 1.0}), inner=inner),
                    make_inputs(),
                )
            )
            flops.append(run.report().flops_done)
            (_,) = programs(run)
    assert torch.ops.toca_fx.linear.default in seen
    assert flops[0] == flops[1]
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
