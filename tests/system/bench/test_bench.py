"""The benchmark: from end to end on a model that is too small to mean anything, on the CPU and on a
made-up GPU; and its parts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toca_fx
from tests.made_up_gpu import MadeUpGpu
from toca_fx import cli
from toca_fx.bench import run as bench_run
from toca_fx.bench.cases import CASES, Case
from toca_fx.bench.contestants import Contestant, Field
from toca_fx.bench.limits import Limits
from toca_fx.examples import PRESETS, Draw
from toca_fx.policy import Policy


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "sample_size": 16,
    }
    monkeypatch.setitem(
        CASES, "dit-xl-2", Case("dit-xl-2-256", "reference/toca-dit-xl-2", 10, config)
    )

    def inputs(d: Draw) -> dict[str, Any]:
        return {
            "hidden_states": d.normal(4, 16, 16),
            "timestep": d.full(500),
            "class_labels": d.whole(1000),
        }

    monkeypatch.setitem(PRESETS, "dit-xl-2-256", replace(PRESETS["dit-xl-2-256"], inputs=inputs))


@pytest.fixture
def on_a_gpu(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is made up, and nothing is compiled but where a test looks at it."""

    def eager(self: Field, name: str, policy: Policy) -> Contestant:
        return Contestant(name, toca_fx.compile(self.model, policy, inner="eager"), self._session)

    monkeypatch.setattr(bench_run, "find_gpu", MadeUpGpu)
    monkeypatch.setattr(bench_run, "measure_limits", lambda place, gpu: Limits(1e12, 1e11))
    monkeypatch.setattr(Field, "toca", eager)
    monkeypatch.setattr(Field, "uncached", lambda self: Contestant("torch.compile", self.model))


@pytest.mark.usefixtures("small")
def test_bench_prints_writes_and_draws_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = [
        "bench",
        "--rounds",
        "1",
        "--threads",
        str(torch.get_num_threads()),
        "--json",
        str(figures),
        "--chart",
        str(picture),
    ]
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
    assert [
        word for word in ("host", "launches", "CUDA graphs", "memory above") if word in printed
    ] == []
    written = json.loads(figures.read_text())
    assert {"date", "torch", "device", "dtype"} <= written.keys()
    assert not {"driver", "cuda"} & written.keys()
    (result,) = written["results"]
    assert {kind["kind"] for kind in result["kinds"]} == {"full", "partial"}
    assert result["flops_ratio"] > 1.5
    assert result["quotient"] == pytest.approx(result["latency_ratio"] / result["flops_ratio"])
    uncached = result["uncached"]
    assert all(
        0 < kind["flops"] < uncached["flops"] and kind["bytes"] > 0
        for kind in result["kinds"]
        if kind["kind"] == "partial"
    )
    assert all(
        kind["host"] == kind["seconds"] and kind["launches"] is None
        for kind in (uncached, *result["kinds"])
    )
    assert result["memory"] is None
    assert result["peak_bytes"] > 2**20
    fewer, fora = result["alternatives"]
    assert fewer["name"] == f"{round(10 / result['flops_ratio'])} steps instead of 10"
    assert fora["name"] == "FORA, N = 3"
    assert fora["flops_ratio"] > 1.5
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow(reason="the same from end to end, as on a GPU")
@pytest.mark.usefixtures("on_a_gpu")
def test_bench_on_a_gpu_has_two_baselines_the_time_of_the_host_launches_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = [
        "bench",
        "--rounds",
        "2",
        "--images",
        "2",
        "--dtype",
        "float32",
        "--alone",
        "--json",
        str(figures),
        "--chart",
        str(picture),
    ]
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    assert [
        word
        for word in ("2 images", "host", "launches", "CUDA graphs", "fastest of the uncached")
        if word not in printed
    ] == []
    written = json.loads(figures.read_text())
    assert (written["device"], written["driver"], written["cuda"]) == (
        "NVIDIA Paper 1",
        None,
        "13.0",
    )
    (result,) = written["results"]
    baselines = {found["name"]: found for found in result["baselines"]}
    assert list(baselines) == ["torch.compile", "torch.compile, CUDA graphs"]
    fastest = min(baselines.values(), key=lambda found: found["generation"])
    assert (result["baseline"], result["uncached"]) == (fastest["name"], fastest["step"])
    assert result["latency_ratio"] == pytest.approx(fastest["generation"] / result["generation"])
    assert result["quotient"] == pytest.approx(result["latency_ratio"] / result["flops_ratio"])
    assert result["ratios"].keys() == {"full", "partial"}
    assert result["memory"] == {"held": 1_000, "uncached": 300, "toca": 3_000}
    assert result["peak_bytes"] is None
    assert {kind["launches"]["kernels"] for kind in (result["uncached"], *result["kinds"])} == {1}
    assert set(result["timings"]) == {*baselines, "toca"}
    for timing in result["timings"].values():
        assert (len(timing["device_ms"]), len(timing["host_ms"]), len(timing["rounds_s"])) == (
            10,
            10,
            2,
        )
        assert sum(timing["host_ms"]) <= 1.01e3 * timing["generation_s"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("on_a_gpu")
def test_a_policy_that_skips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is chosen, and so no contestant shows what choosing costs."""
    monkeypatch.setattr(Field, "alternatives", lambda self, policy: [])
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["bench", "--rounds", "1", "--policy", "digits", "--dtype", "float32"]
    assert cli.main([*options, "--json", str(figures), "--chart", str(picture)]) == 0
    (result,) = json.loads(figures.read_text())["results"]
    assert result["ratios"].keys() == {"full", "skip"}
    assert "unscored" not in result["timings"]
    skips = [kind for kind in result["kinds"] if kind["kind"] == "skip"]
    assert [kind["flops"] for kind in skips] == [0]
    printed = capsys.readouterr().out
    assert "skip" in printed
    assert not [word for word in ("choosing tokens", "scoring tokens", "nan") if word in printed]


@pytest.mark.slow(reason="one more bench from end to end")
@pytest.mark.usefixtures("on_a_gpu")
def test_a_baseline_that_fails_is_named_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**call: Any) -> None:
        raise RuntimeError("capture failed\nsomewhere")

    monkeypatch.setattr(
        Field, "uncached_recorded", lambda self: Contestant("torch.compile, CUDA graphs", fails)
    )
    assert (
        cli.main(["bench", "--rounds", "1", "--steps", "4", "--dtype", "float32", "--alone"]) == 0
    )
    printed = capsys.readouterr().out
    assert "does not run: capture failed" in printed
    assert "fastest of the uncached" not in printed
