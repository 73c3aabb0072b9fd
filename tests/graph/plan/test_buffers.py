"""Names, shapes and dtypes of what a step graph takes."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import capture_tiny, make_policy
from toca_fx.match.matcher import match
from toca_fx.plan.buffers import Buffers, given, kept, site_of
from toca_fx.plan.plan import make_plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_of_a_dit_whose_attention_is_partial(dtype: torch.dtype) -> None:
    source, _ = capture_tiny("original", layers=1, dtype=dtype)
    modules = {"self_attention": {"weight": 1.0}}
    plan = make_plan(match(source.graph), make_policy(modules=modules))
    names = kept(plan)
    # One linear makes q, k and v: keys and values are two reads of it.
    assert [name for name in names if not name.startswith("keys")] == [
        "cache:0",
        "cache:1",
        "score:0",
        "score:1",
        "picked:0",
        "picked:1",
    ]
    assert any(name.startswith("keys:0:") for name in names)
    partial = next(step.modes for step in plan.steps if step.kind == "partial")
    assert given(plan, partial) == ["order:0", "order:1", "ranks:0", "ranks:1"]
    assert given(plan, plan.full_modes) == []
    made = Buffers(source, plan)
    for name in names:
        buffer, role = made.new(name), name.split(":")[0]
        assert tuple(buffer.shape[:2]) == (2, 64)
        assert buffer.dtype == (torch.bool if role == "picked" else dtype)
        assert buffer.is_contiguous()
        assert site_of(name) in (0, 1)
    read = made.new("read")
    assert (read.device.type, read.dtype, read.dim(), bool(read)) == ("cpu", torch.bool, 0, True)
    assert tuple(made.example("order:1", 5).shape) == (2, 64)
    assert tuple(made.example("ranks:1", 5).shape) == (5,)
    assert tuple(made.example("known:1", 5).shape) == (2, 64)
