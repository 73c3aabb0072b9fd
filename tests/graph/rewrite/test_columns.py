"""The operator of s1 in the step graphs of a model on a GPU that is not there."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import analysis_of, make_policy
from tests.made_up_cuda import fake_example, made_up_cuda
from toca_fx.capture.dynamo import capture
from toca_fx.examples import examples
from toca_fx.plan.buffers import READ
from toca_fx.rewrite.step import rewrite

OPERATOR = torch.ops.toca_fx.attention_and_columns.default


@torch.no_grad()
def test_a_step_on_a_gpu_is_told_whether_its_scores_are_read() -> None:
    with made_up_cuda(), FakeTensorMode(allow_non_fake_inputs=True):
        module, call = fake_example(examples()["FluxTransformer2DModel"], torch.bfloat16)
        captured, inputs = capture(module, (), call)
    with made_up_cuda():
        # Image and text MLP of a double block share its attention.
        rules = [{"match": "mlp", "path": "*.ff_context*", "scores": {"queries": 0.5}}]
        policy = make_policy(scores={"self_attention": 1.0, "queries": 0.25}, rules=rules)
        analysis = analysis_of(captured, inputs, policy)
        plan = analysis.plan(None)
        partial = next(step.modes for step in plan.steps if step.kind == "partial")
        full, later = (
            rewrite(analysis.aten, plan.step(modes)) for modes in (plan.full_modes, partial)
        )
    operators = [node for node in full.module.graph.nodes if node.target is OPERATOR]
    assert len(operators) == len(
        {plan.sites[plan.sites[i].influence or 0].anchor for i in plan.scored_by_attention}
    )
    assert full.buffers.count(READ) == 1
    (read,) = (
        node for node in full.module.graph.find_nodes(op="placeholder") if node.target == "read"
    )
    assert [operator.args[4:] for operator in operators] == [
        (3, read),
        (3, read),
        (5, read),
        (5, read),
    ]
    value = read.meta["val"]
    assert (value.device.type, value.dtype, value.dim()) == ("cpu", torch.bool, 0)
    assert READ not in later.buffers, "which scores nothing"
