"""Names, shapes and dtypes of what a step graph takes."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import capture_tiny, make_policy
from toca_fx.match.matcher import match
from toca_fx.plan.buffers import READ, Buffer
from toca_fx.plan.planner import make_plan
from toca_fx.rewrite.step import rewrite
from toca_fx.rewrite.tensors import Tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_of_a_dit_whose_attention_is_partial(dtype: torch.dtype) -> None:
    source, _ = capture_tiny("original", layers=1, dtype=dtype)
    modules = {"self_attention": {"weight": 1.0}}
    plan = make_plan(match(source.graph), make_policy(modules=modules))
    names = plan.kept
    # One linear makes q, k and v: keys and values are two reads of it.
    assert [name for name in names if name.role != "keys"] == [
        Buffer("cache", 0),
        Buffer("cache", 1),
        Buffer("score", 0),
        Buffer("score", 1),
        Buffer("picked", 0),
        Buffer("picked", 1),
    ]
    assert any(name[:2] == ("keys", 0) for name in names)
    partial = next(step.modes for step in plan.steps if step.kind == "partial")
    given = [Buffer(role, site) for role in ("order", "ranks") for site in (0, 1)]
    of_partial = rewrite(source, plan.step(partial)).buffers
    assert {buffer for buffer in of_partial if buffer not in names} == set(given)
    assert set(rewrite(source, plan.step(plan.full_modes)).buffers) <= set(names)
    made = Tensors(source, plan)
    for name in names:
        buffer, role = made.new(name), name.role
        assert tuple(buffer.shape[:2]) == (2, 64)
        assert buffer.dtype == (torch.bool if role == "picked" else dtype)
        assert buffer.is_contiguous()
        assert name.site in (0, 1)
    read = made.new(READ)
    assert (read.device.type, read.dtype, read.dim(), bool(read)) == ("cpu", torch.bool, 0, True)
    assert tuple(made.example(Buffer("order", 1), 5).shape) == (2, 64)
    assert tuple(made.example(Buffer("ranks", 1), 5).shape) == (5,)
    assert tuple(made.example(Buffer("known", 1), 5).shape) == (2, 64)
