"""The benchmark from end to end on a model that is too small to mean anything."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from toca_fx import bench


def test_bench_prints_and_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    options = argparse.Namespace(
        policy="dit-xl-2", hidden=64, blocks=2, tokens=64, batch=2, rounds=1, threads=torch.get_num_threads(), json=str(target)
    )
    assert bench.main(options) == 0
    printed = capsys.readouterr().out
    for word in ("uncached step", "full step", "partial step", "latency ratio", "FLOPs ratio", "quotient", "compile time"):
        assert word in printed
    figures = json.loads(target.read_text())
    assert figures["kinds"].keys() == {"full", "partial"}
    assert figures["flops_ratio"] > 1.5
    assert figures["quotient"] == pytest.approx(figures["latency_ratio"] / figures["flops_ratio"])


def test_bench_refuses_shapes_that_make_no_model() -> None:
    with pytest.raises(SystemExit, match="square"):
        bench.build_dit(64, 1, 60)
