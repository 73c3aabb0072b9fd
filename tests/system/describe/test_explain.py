"""toca_fx.explain beside sessions and compiled models: what it says is what then happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import toca_fx
from tests.helpers import KINDS, call, explain_tiny, make_inputs, make_policy, run_all, tiny
from tests.marks import slow_but
from tests.models import OriginalDiT, tiny_dit
from toca_fx import examples as integration

PARTIAL = {
    "self_attention": "reuse",
    "cross_attention": {"weight": 0.5},
    "joint_attention": "reuse",
    "mlp": {"weight": 1.0},
}


@pytest.fixture(autouse=True)
def _no_policy_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOCA_POLICY", raising=False)


# What it says is what happens


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_does_what_was_explained(kind: str) -> None:
    policy = make_policy(modules=PARTIAL, R={"base": 0.5, "layer_weight": 0.4})
    told = explain_tiny(kind, policy)
    with toca_fx.session() as run:
        run_all(toca_fx.compile(tiny(kind), policy, inner="eager"), make_inputs())
    report = run.report()
    assert (told.flops_done, told.flops_uncached) == (report.flops_done, report.flops_uncached)
    assert 0 < told.cache_bytes == report.cache_bytes
    assert told.hoisted_bytes == report.hoisted_bytes
    assert told.steps == tuple((step.index, step.kind) for step in report.steps)
    assert [(s.path, s.kind, s.layer, s.tokens, s.computed) for s in told.sites] == [
        (s.path, s.kind, s.layer, s.tokens, s.computed) for s in report.sites
    ]


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["PixArtTransformer2DModel"],
        ["PixArtTransformer2DModel", "FluxTransformer2DModel"],
        "of the classes, one is enough",
    ),
)
def test_models_on_the_meta_device(name: str) -> None:
    model, inputs = integration.build(integration.examples()[name], device="meta")
    told = toca_fx.explain(model, make_policy(modules=PARTIAL), num_steps=6, **inputs)
    assert told.model == name
    assert len(told.steps) == 6
    assert {site.kind for site in told.sites} >= {"mlp", "self_attention"}
    assert 0 < told.flops_done < told.flops_uncached
    assert told.cache_bytes > 0
    assert told.step_bytes > 0
    assert told.peak_bytes >= told.cache_bytes + told.hoisted_bytes + told.step_bytes


def test_the_device_makes_no_difference() -> None:
    example = integration.examples()["DiTTransformer2DModel"]
    pages = []
    for device in ("cpu", "meta"):
        model, inputs = integration.build(example, device=device)
        # Not by attention: s1 is computed in another way, at other cost, on each kind of device.
        pages.append(
            toca_fx.explain(model, make_policy(scores={"staleness": 1.0}), **inputs).to_dict()
        )
    assert pages[0] == pages[1]


def test_a_model_that_is_compiled_already() -> None:
    model, policy = tiny("diffusers", layers=1), make_policy()
    x, t, y = next(iter(make_inputs(1)))
    plain = toca_fx.explain(model, policy, x, timestep=t, class_labels=y)
    for compiled in (
        toca_fx.compile(model, policy, inner="eager"),
        torch.compile(model, backend="eager"),
    ):
        assert toca_fx.explain(compiled, policy, x, timestep=t, class_labels=y) == plain


def test_a_compiled_model_is_not_recompiled() -> None:
    model, compiled = tiny_dit(num_layers=1), []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(graph)
        return graph.forward

    fast = torch.compile(model, backend=counting)
    with torch.no_grad():
        for batch in (2, 3):
            x, t, y = next(iter(make_inputs(1, batch=batch)))
            toca_fx.explain(model, make_policy(), x, timestep=t, class_labels=y)
        for _ in range(2):
            x, t, y = next(iter(make_inputs(1)))
            call(fast, x, t, y) if isinstance(fast, OriginalDiT) else fast(
                x, timestep=t, class_labels=y
            )
            toca_fx.explain(model, make_policy(), x, timestep=t, class_labels=y)
    assert len(compiled) == 1
    assert not any(
        isinstance(node.meta["example_value"], torch.SymInt)
        for graph in compiled
        for node in graph.graph.find_nodes(op="placeholder")
    )


def test_suggested_rules_do_what_they_say() -> None:
    import yaml

    sections: dict[str, Any] = {"modules": {"self_attention": "compute", "mlp": "compute"}}
    before = explain_tiny(policy=make_policy(**sections), layers=2)
    assert before.cache_bytes == 0
    rules = yaml.safe_load("\n".join(before.suggestions))
    after = explain_tiny(policy=make_policy(**sections, rules=rules), layers=2)
    assert {site.action for site in after.sites} == {"reuse", "partial"}
    assert after.suggestions == ()
