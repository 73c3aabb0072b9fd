"""toca_fx.explain of forecasts, of what units keep, and of steps that run no block."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toca_fx
from tests.helpers import explain_tiny, make_policy
from toca_fx.describe.explanation import Explanation
from toca_fx.describe.memories import in_words
from toca_fx.describe.site import Kept
from toca_fx.policy import Forecast

ORDER_1 = {"basis": "newton", "order": 1}
REUSED = {"modules": {"mlp": "reuse"}, "scores": {"staleness": 1.0}}


def rows(told: Explanation) -> list[str]:
    """The rows of sites."""
    page = str(told).splitlines()
    first, last = page.index("") + 1, page.index("", page.index("") + 1)
    return [" ".join(line.split()) for line in page[first:last]]


@pytest.mark.parametrize(
    ("grain", "kind", "tokens", "shape"),
    [("model", "state", 64, (2, 64, 32)), ("output", "output", 128, (2, 8, 16, 16))],
)
def test_a_memory_of_the_model(grain: str, kind: str, tokens: int, shape: tuple[int, ...]) -> None:
    policy = make_policy(cache={"grain": grain}, forecast={"basis": "newton", "order": 2})
    told = explain_tiny(policy=policy)
    # Call 6 is the first full one with three values at 0, 3, 6; two steps beyond the last of them
    # the parabola weighs 1.67 * 2.67 / 2, -0.67 * 2.67 and 0.67 * 1.67 / 2: 4.56 in sum. Before,
    # on the line through 0 and 3, it is 2.33.
    size = f"{list(shape)} float32"
    assert rows(told) == [
        *[
            f"transformer_blocks.0-2.{path} {module} 64 tokens computed on 4, skipped on 8 of 12 "
            "steps: cache.grain keeps the whole model"
            for path, module in (("attn1", "self_attention"), ("ff", "mlp"))
        ],
        f"(the model) {kind} {tokens} tokens full on 4, forecast on 8 of 12 steps",
        f"0.0 MiB: keeps 3 values {size} of the {grain}; forecast by newton of order 2 by step, "
        "errors at most 4.56 times as large (s = 8)",
    ]
    assert [(each.kind, each.count) for each in told.kinds] == [("full", 4), ("skip", 8)]
    kept = told.sites[-1].kept
    assert kept is not None
    assert kept.nbytes == 3 * 4 * torch.Size(shape).numel()
    assert told.cache_bytes == kept.nbytes + 3 * 4, "and three weights"
    assert told.suggestions == (), "a rule could not change what the grain says"
    data = json.loads(json.dumps(told.to_dict()))
    assert data == told.to_dict()
    assert data["kinds"][1] == {"kind": "skip", "count": 8, "share": told.kinds[1].share}


def test_the_work_of_kinds_adds_up() -> None:
    told = explain_tiny(policy=make_policy(skip="alternate", N={"base": 4}))
    assert [(each.kind, each.count) for each in told.kinds] == [
        ("full", 3),
        ("partial", 6),
        ("skip", 3),
    ]
    full, partial, skip = (each.share for each in told.kinds)
    assert full >= 1 > partial > skip > 0
    steps = sum(each.count * each.share for each in told.kinds) * told.flops_uncached / 12
    assert steps == pytest.approx(told.flops_done, rel=0.01)  # less what comes once, of captions
    assert "12: 3 full, 6 partial, 3 skip" in str(told)
    assert f"partial {partial:.2%}, skip {skip:.2%} of an uncached step" in str(told)
    attention, mlp = rows(told)[:2]
    assert attention.endswith("full on 3, reused on 6, skipped on 3 of 12 steps")
    assert mlp.endswith("full on 3, 32 of 64 tokens on 6, skipped on 3 of 12 steps")


def test_modules_keep_histories() -> None:
    told = explain_tiny(policy=make_policy(**REUSED, forecast=ORDER_1), layers=1)
    kept = Kept("module", 2, (2, 64, 32), "float32", 2 * 4 * 2 * 64 * 32, "", 7 / 3, 5)
    words = "forecast by newton of order 1 by step"
    for site in told.sites:
        assert site.kept is not None
        assert site.kept.forecast == words
        assert site.kept.noise == pytest.approx(7 / 3)
        assert site.kept == Kept(**{**vars(kept), "forecast": words, "noise": site.kept.noise})
    assert rows(told)[0].endswith("full on 4, forecast on 8 of 12 steps")
    assert rows(told)[1] == (
        f"0.0 MiB: keeps 2 values [2, 64, 32] float32 of the module; {words}, errors at most 2.33 "
        "times as large (s = 5)"
    )
    assert told.cache_bytes == 2 * kept.nbytes + 2 * 4, "they share their weights"


def test_a_block_keeps_one_history() -> None:
    policy = make_policy(**REUSED, forecast=ORDER_1, cache={"grain": "block", "dtype": "bfloat16"})
    told = explain_tiny(policy=policy, layers=2)
    kept = [site.kept for site in told.sites]
    assert [one and (one.grain, one.history, one.dtype) for one in kept] == [
        ("block", 2, "bfloat16")
    ] * 4
    assert [one and one.nbytes for one in kept] == [2 * 2 * 2 * 64 * 32, 0] * 2
    assert sum("of the block" in row for row in rows(told)) == 1


def test_what_is_reused_is_said_as_before() -> None:
    told = explain_tiny(policy=make_policy(**REUSED), layers=1)
    assert [site.kept and site.kept.forecast for site in told.sites] == ["the newest is reused"] * 2
    assert not any("keeps" in row for row in rows(told))


@pytest.mark.parametrize(
    ("forecast", "history", "words"),
    [
        (Forecast(), 1, "the newest is reused"),
        (Forecast("newton", order=0), 1, "the newest is reused"),
        (Forecast("newton"), 2, "forecast by newton of order 1 by step"),
        (Forecast("chebyshev"), 5, "forecast by chebyshev of order 4 by step, ridge 0.1"),
        (Forecast("hermite", order=2), 3, "forecast by hermite of order 2 by step, sigma 0.5"),
        (
            Forecast("taylor", order=2, ignore=1, damping=0.9, time="log_snr"),
            3,
            "forecast by taylor of order 2 by log_snr, damping 0.9, ignore 1",
        ),
        (
            Forecast("taylor", ignore=0, blend=0.5),
            2,
            "forecast by taylor of order 1 by step, blend 0.5",
        ),
        (Forecast("table", weights=((2.0, -1.0),)), 2, "forecast by a table of weights"),
    ],
)
def test_forecasts_in_words(forecast: Forecast, history: int, words: str) -> None:
    assert in_words(forecast, history) == words


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        seen = F.scaled_dot_product_attention(q, k, v)
        return x + seen, seen


class Beside(nn.Module):
    """The outputs read the last attention beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, seen = block(x)
        return x * seen


def test_a_model_that_cannot_be_cut_says_why() -> None:
    why = "the outputs read `blocks.1` (self_attention) beside the residual stream"
    x = torch.randn(2, 9, 16)
    reused = toca_fx.explain(Beside(), make_policy(**REUSED), x)
    assert reused.uncut == why
    assert f"grain      of the model: its output only, as {why}" in str(reused)
    assert not reused.warnings
    told = toca_fx.explain(Beside(), make_policy(cache={"grain": "model"}), x)
    assert [site.kind for site in told.sites] == ["self_attention"] * 2 + ["output"]
    (warning,) = told.warnings
    assert f"the output layers cannot be cut off ({why})" in warning
    assert "warning: " + warning in str(told)
    assert explain_tiny(layers=1).uncut == ""
