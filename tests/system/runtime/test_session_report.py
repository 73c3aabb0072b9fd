"""The report of a session: as data, its bytes, its warnings."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

import toca_fx
from tests.helpers import call, make_inputs, run_all, tiny
from tests.marks import slow_but
from tests.system.runtime.generations import DEFAULT, fast_twin

KEYS = {
    "steps",
    "kinds",
    "sites",
    "flops",
    "cache_bytes",
    "hoisted_bytes",
    "moved_bytes",
    "seconds",
    "selection_seconds",
    "compiled_graphs",
    "launches",
    "warnings",
    "notes",
}


def test_the_report_as_data() -> None:
    fast = fast_twin(tiny("diffusers", layers=2))
    with toca_fx.session() as run:
        run_all(fast, make_inputs())
    data = run.report().to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data.keys() == KEYS
    assert [(step["index"], step["kind"], step["branch"]) for step in data["steps"]] == [
        (s, DEFAULT[s], "") for s in range(12)
    ]
    assert all(step["seconds"] > 0 for step in data["steps"])
    sites = {site["path"]: site for site in data["sites"]}
    assert list(sites) == [
        f"transformer_blocks.{layer}.{name}" for layer in range(2) for name in ("attn1", "ff")
    ]
    assert sites["transformer_blocks.1.attn1"] == {
        "path": "transformer_blocks.1.attn1",
        "kind": "self_attention",
        "layer": 1,
        "tokens": 64,
        "computed": [64, 0, 0] * 4,
    }
    assert sites["transformer_blocks.0.ff"]["computed"] == [64, 32, 32] * 4
    assert 0 < data["flops"]["done"] < data["flops"]["uncached"]
    assert 0 < data["selection_seconds"] < data["seconds"]
    assert data["compiled_graphs"] == 2
    assert data["warnings"] == []
    assert "12 steps: 4 full, 8 partial" in str(run.report())


@pytest.mark.parametrize(
    "dtype",
    slow_but(
        [torch.bfloat16], [torch.float32, torch.float64, torch.bfloat16], "one width is enough"
    ),
)
def test_cache_bytes_are_those_allocated(dtype: torch.dtype) -> None:
    batch, tokens, channels, layers = 3, 64, 32, 2
    model = tiny("original", layers=layers).to(dtype)
    fast = fast_twin(model)
    with toca_fx.session() as run:
        run_all(fast, make_inputs(2, batch=batch, dtype=dtype))
        (generation,) = run.session.generations
        tensors = [*generation.storage.buffers.values(), *generation.storage.selector.counters]
        allocated = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    score = 8 if dtype == torch.float64 else 4
    features = 2 * layers * batch * tokens * channels * dtype.itemsize
    assert (
        run.report().cache_bytes
        == allocated
        == features + layers * batch * tokens * (2 * score + 1)
    )


def test_cache_bytes_of_two_branches(model: nn.Module) -> None:
    fast = fast_twin(model)
    sizes = []
    for branches in (("a",), ("a", "b")):
        with toca_fx.session() as run, torch.no_grad():
            for step in make_inputs(2):
                for name in branches:
                    with toca_fx.branch(name):
                        call(fast, *step)
        sizes.append(run.report().cache_bytes)
    assert sizes[1] == 2 * sizes[0] > 0


class Scaling(nn.Module):
    """A model without sites."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return hidden_states * timestep[:, None]


def test_a_model_without_sites_is_in_the_report_too() -> None:
    fast, other = fast_twin(tiny("diffusers", layers=2)), fast_twin(Scaling().eval())
    with toca_fx.session() as run, torch.no_grad():
        for x, t, y in make_inputs():
            call(fast, x, t, y)
            other(torch.ones(1, 4), t[:1].float())
    kinds = [step.kind for step in run.report().steps]
    assert len(kinds) == 24
    assert kinds[1::2] == ["full"] * 12
    assert kinds[::2] == DEFAULT


def test_a_report_without_calls() -> None:
    with toca_fx.session() as run:
        pass
    data = run.report().to_dict()
    assert data.keys() == KEYS
    assert data["steps"] == data["sites"] == []
    assert "no sites" in str(run.report())


def test_warnings_are_logged_once(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="toca_fx")
    fast = fast_twin(model)
    with toca_fx.session(num_steps=2) as run:
        run_all(fast, make_inputs(6))
    said = list(run.report().warnings)
    assert len(said) == 2
    assert caplog.messages == [f"toca_fx: {warning}" for warning in said]
