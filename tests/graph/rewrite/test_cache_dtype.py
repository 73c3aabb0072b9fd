"""Caches in another dtype than the model's: where step graphs convert."""

from __future__ import annotations

import torch

from tests.helpers import analysis_of, capture, make_policy
from toca_fx.examples import build, examples
from toca_fx.graph.ops import aten

EVERYTHING_PARTIAL = {
    kind: {"weight": 1.0}
    for kind in ("self_attention", "cross_attention", "joint_attention", "mlp")
}


def test_a_rule_sets_the_dtype_of_its_sites() -> None:
    example = examples()["DiTTransformer2DModel"]
    captured, flat = capture(*(build(example)[0],), **build(example)[1])
    rules = [{"match": "mlp", "layers": 1, "cache": {"dtype": "bfloat16"}}]
    found = analysis_of(captured, flat, make_policy(scores={"random": 1.0}, rules=rules))
    plan = found.plan(None)
    for kind, conversions in (("full", 0), ("partial", 2)):
        step = found.step_graph(plan, next(step.modes for step in plan.steps if step.kind == kind))
        casts = step.module.graph.find_nodes(op="call_function", target=aten.to.dtype)
        assert (
            len(
                [
                    node
                    for node in casts
                    if torch.bfloat16 in (node.args[1], node.args[0].meta.get("val", flat[0]).dtype)
                ]
            )
            == conversions
        )
