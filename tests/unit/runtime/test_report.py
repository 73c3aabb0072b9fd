"""The report as text and as data."""

from __future__ import annotations

import json

from toca_fx.plan.plan import Plan, Settings, StepPlan
from toca_fx.runtime.report import Report, SiteRecord, StepRecord

PLAN = Plan((), (), (), Settings("test", 2, 0, False, False, 0, 0))


def _report() -> Report:
    steps = (
        StepRecord(0, "full", "", 1.0, 0.0, StepPlan(0, ("full", "full"), (64, 64)), PLAN, 0),
        StepRecord(
            1, "partial", "", 0.5, 0.1, StepPlan(1, ("reuse", "partial"), (0, 16)), PLAN, 10
        ),
    )
    sites = (
        SiteRecord("blocks.0.attn", "self_attention", 0, 64, (64, 0)),
        SiteRecord("blocks.0.mlp", "mlp", 0, 64, (64, 16)),
    )
    return Report(steps, sites, (100, 40), 200, 2**20, 3 * 2**20, 2, ("mind the step",))


def test_dict_is_json_with_the_promised_keys() -> None:
    data = json.loads(json.dumps(_report().to_dict()))
    assert {
        "steps",
        "sites",
        "flops",
        "cache_bytes",
        "selection_seconds",
        "compiled_graphs",
        "warnings",
    } <= set(data)
    assert [(step["index"], step["kind"], step["seconds"]) for step in data["steps"]] == [
        (0, "full", 1.0),
        (1, "partial", 0.5),
    ]
    assert data["sites"][1] == {
        "path": "blocks.0.mlp",
        "kind": "mlp",
        "layer": 0,
        "tokens": 64,
        "computed": [64, 16],
    }
    assert data["flops"] == {"done": 150, "uncached": 200}
    assert data["selection_seconds"] == 0.1


def test_text_says_what_a_reader_wants_to_know() -> None:
    text = str(_report())
    assert "2 steps: 1 full, 1 partial" in text
    assert "1.33x fewer" in text
    assert "1.0 MiB, and 3.0 MiB of hoisted values" in text
    assert "62.5%" in text  # of the MLP's tokens: (64 + 16) of 128
    assert "warning: mind the step" in text


def test_a_report_of_nothing_is_no_error() -> None:
    empty = Report((), (), (), 0, 0, 0, 0, ())
    assert empty.flops_ratio == 1.0
    assert "no sites" in str(empty)
