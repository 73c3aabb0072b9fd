"""A model that Dynamo cannot capture as one graph is captured in several, and cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import toca_fx
from tests.helpers import make_policy
from tests.models import randomize, tiny_original_dit
from toca_fx.examples import build, examples, prediction, vary

STEPS = 6


class Decides(nn.Module):
    """Looks at the lengths of its texts ahead of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(8, 4)
        self.blocks = randomize(tiny_original_dit(depth=2), seed=0)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        shift = self.text(text).mean(1)[..., None, None]
        if len(set(mask.sum(1).tolist())) > 1:
            shift = shift / 2
        return self.blocks(x + shift, t=t, y=y)


def test_several_graphs_are_one_step(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Decides().eval().requires_grad_(False)
    fixed = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([1, 2])
    calls = [(torch.randn(2, 4, 16, 16), torch.full((2,), 900 - i), *fixed) for i in range(STEPS)]
    for base, kinds in ((1, {"full": 6}), (3, {"full": 2, "partial": 4})):
        torch._dynamo.reset()
        caplog.clear()
        policy = make_policy(sampler={"steps": STEPS}, N={"base": base})
        fast = toca_fx.compile(model, policy, inner="eager")
        with torch.no_grad(), toca_fx.session(num_steps=STEPS) as run:
            outputs = [fast(*call).clone() for call in calls]
        equal = [torch.equal(ours, model(*call)) for ours, call in zip(outputs, calls, strict=True)]
        assert all(equal) == (base == 1)
        assert run.report().kinds == kinds
        assert [site.kind for site in run.report().sites] == ["self_attention", "mlp"] * 2
        (warning,) = [
            record.message for record in caplog.records if record.message.startswith("toca_fx:")
        ]
        assert "Decides cannot be captured as one graph, because of" in warning
        assert "test_parts.py" in warning


def test_a_gate_measures_whole_models(caplog: pytest.LogCaptureFixture) -> None:
    """It is said, once, why nothing is cached; without the gate it is."""
    torch.manual_seed(0)
    model = Decides().eval().requires_grad_(False)
    fixed = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([1, 2])
    calls = [(torch.randn(2, 4, 16, 16), torch.full((2,), 900 - i), *fixed) for i in range(STEPS)]
    output: dict[str, Any] = {"sampler": {"steps": STEPS}, "cache": {"grain": "output"}}
    gate = {"signal": "surprise", "threshold": 9.0, "at_most": 3}
    gated = make_policy(**output, N={"first": 2}, gate=gate, forecast={"basis": "newton"})
    for policy, kinds in (
        (gated, {"full": STEPS}),
        (make_policy(**output, N={"base": 3}), {"full": 2, "skip": 4}),
    ):
        torch._dynamo.reset()
        caplog.clear()
        fast = toca_fx.compile(model, policy, inner="eager")
        with torch.no_grad(), toca_fx.session(num_steps=STEPS) as run:
            for call in calls:
                fast(*call)
        assert run.report().kinds == kinds
        said = [record.message for record in caplog.records if "gate" in record.message]
        assert len(said) == (policy is gated)
        assert all("full_steps" in message for message in said)


class Marks(Decides):
    """Writes into a tensor that the graph before has made, in a graph without blocks.

    The first of its graphs is that of another function.
    """

    def marked(self, x: Tensor, mask: Tensor) -> Tensor:
        marked = x + 1
        marked[:, :, mask.sum(1).tolist()] = 0
        return marked

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.marked(x, mask), t, text, mask, y)


class MarksWithBlocks(Marks):
    """The same in the graph that has the blocks."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        marked = x + 1
        marked[:, :, mask.sum(1).tolist()] = 0
        return self.blocks(marked, t=t, y=y)


@pytest.mark.parametrize("kind", [Marks, MarksWithBlocks])
def test_a_graph_that_writes_into_what_another_made_runs_as_it_is(
    kind: type[Marks], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = kind().eval().requires_grad_(False)
    fixed = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([1, 2])
    calls = [(torch.randn(2, 4, 16, 16), torch.full((2,), 900 - i), *fixed) for i in range(STEPS)]
    policy = make_policy(sampler={"steps": STEPS}, scores={"staleness": 1.0})
    fast = toca_fx.compile(model, policy, inner="eager")
    with torch.no_grad(), toca_fx.session(num_steps=STEPS) as run:
        outputs = [fast(*call).clone() for call in calls]
    steps = zip(run.report().steps, outputs, calls, strict=True)
    equal = [(step.kind, torch.equal(ours, model(*call))) for step, ours, call in steps]
    cached = [("full", True), ("partial", False), ("partial", False)] * 2
    assert equal == (cached if kind is Marks else [("full", True)] * STEPS)
    said = "one runs as it is, at every step: the model writes to a tensor in place"
    assert (said in caplog.text) == (kind is MarksWithBlocks)
    assert not run.report().warnings


def test_qwen_image_21_is_cached() -> None:
    """Its blocks are in the last of its graphs; those between make masks, in place."""
    example = examples()["QwenImage21Transformer2DModel"]
    model, first = build(example)
    calls = [vary(example, first, step, STEPS) for step in range(STEPS)]
    policy = make_policy(sampler={"steps": STEPS}, scores={"staleness": 1.0})
    fast = toca_fx.compile(model, policy, inner="eager")
    with torch.no_grad(), toca_fx.session(num_steps=STEPS) as run:
        outputs = [prediction(fast(**call))[0].clone() for call in calls]
        expected = [prediction(model(**call))[0] for call in calls]
    steps = zip(run.report().steps, outputs, expected, strict=True)
    equal = [(step.kind, torch.equal(ours, theirs)) for step, ours, theirs in steps]
    assert equal == [("full", True), ("partial", False), ("partial", False)] * 2
    assert len(run.report().sites) == 4


@pytest.mark.parametrize("made", ["in memory", "on disk"])
def test_weights_may_be_other_tensors_at_each_call(made: str, tmp_path: Path) -> None:
    """Sequential offload: what runs between the graphs has those of a call."""
    accelerate: Any = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = Decides().eval().requires_grad_(False)
    fixed = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([1, 2])
    calls = [(torch.randn(2, 4, 16, 16), torch.full((2,), 900 - i), *fixed) for i in range(STEPS)]
    policy = make_policy(sampler={"steps": STEPS}, scores={"staleness": 1.0})
    with torch.no_grad():
        expected = [model(*call) for call in calls]
        if made == "in memory":
            accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        fast = toca_fx.compile(model, policy, inner="eager")
        counters.clear()
        for _ in range(2):
            with toca_fx.session(num_steps=STEPS) as run:
                outputs = [fast(*call).clone() for call in calls]
            steps = zip(run.report().steps, outputs, expected, strict=True)
            equal = [(step.kind, torch.equal(ours, theirs)) for step, ours, theirs in steps]
            assert equal == [("full", True), ("partial", False), ("partial", False)] * 2
    assert counters["stats"]["unique_graphs"] == 2
    assert all(weight.device.type == "meta" for weight in model.parameters())


def test_blocks_alone_are_not_cached(caplog: pytest.LogCaptureFixture) -> None:
    """The default policy would forecast what each of them puts out."""
    torch._dynamo.reset()
    example = examples()["WanTransformer3DModel"]
    model, first = build(example)
    calls = [vary(example, first, step, STEPS) for step in range(STEPS)]
    with torch.no_grad():
        expected = [prediction(model(**call))[0] for call in calls]
        model.compile_repeated_blocks(backend="toca", options={"inner": "eager"})
        outputs = [prediction(model(**call))[0] for call in calls]
    assert all(map(torch.equal, outputs, expected))
    said = [record.message for record in caplog.records if "blocks alone" in record.message]
    assert said
    assert all("toca_fx.compile(model)" in message for message in said)
