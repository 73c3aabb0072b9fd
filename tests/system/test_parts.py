"""A model that Dynamo cannot capture as one graph is captured in several, and cached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
