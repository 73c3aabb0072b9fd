"""The benchmark from end to end on a model that is too small to mean anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from toca_fx import cli
from toca_fx.bench.cases import CASES, Case, example_of
from toca_fx.integrations.diffusers import PRESETS
from toca_fx.policy import shipped_policies


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "sample_size": 16}
    monkeypatch.setitem(CASES, "dit-xl-2", Case("dit-xl-2-256", "dit-xl-2", 10, config))
    inputs = lambda d: {"hidden_states": d.normal(4, 16, 16), "timestep": d.full(500), "class_labels": d.whole(1000)}  # noqa: E731
    monkeypatch.setitem(PRESETS, "dit-xl-2-256", replace(PRESETS["dit-xl-2-256"], inputs=inputs))


@pytest.mark.usefixtures("small")
def test_bench_prints_writes_and_draws_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["bench", "--rounds", "1", "--threads", str(torch.get_num_threads()), "--json", str(figures), "--chart", str(picture)]
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    assert "the session was planned for" not in caplog.text
    words = (
        "uncached",
        "full",
        "partial",
        "roofline",
        "latency ratio",
        "choosing tokens ahead",
        "instead: FORA",
        "instead: ",
        "FLOPs ratio",
        "quotient",
        "first calls",
        "peak memory",
    )
    assert [word for word in words if word not in printed] == []
    (result,) = json.loads(figures.read_text())["results"]
    assert {kind["kind"] for kind in result["kinds"]} == {"full", "partial"}
    assert result["flops_ratio"] > 1.5
    assert result["quotient"] == pytest.approx(result["latency_ratio"] / result["flops_ratio"])
    uncached = result["uncached"]
    assert all(0 < kind["flops"] < uncached["flops"] and kind["bytes"] > 0 for kind in result["kinds"] if kind["kind"] == "partial")
    fewer, fora = result["alternatives"]
    assert fewer["name"] == f"{round(10 / result['flops_ratio'])} steps instead of 10"
    assert fora["name"] == "FORA, N = 3"
    assert fora["flops_ratio"] > 1.5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_case_has_its_preset_and_its_policy() -> None:
    for case in CASES.values():
        assert case.policy in shipped_policies()
        assert case.config.keys() <= PRESETS[case.preset].config.keys()
        assert example_of(case, 3).config["num_layers"] == 3


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "sdxl"]) == 2
    assert "unknown case `sdxl`; there are dit-xl-2, dit-xl-2-512, pixart-alpha, latte, flux-dev, flux-dev-1024" in capsys.readouterr().err
